"""vLLM's layers of LoRA, without vLLM: its tensors as they lie, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora.integrations.vllm import layers as vllm_layers
from fastlora.integrations.vllm.layers import Layers, count_ranks
from fastlora.integrations.vllm.step import DeviceSteps
from tests.support.helpers import assert_accurate, same_bits, signed, unchanged
from tests.support.serving.stacked import Stacked

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = (24, 8, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [WIDTHS, (21,)])
@pytest.mark.parametrize("T", [1, 13, 70])
def test_linear_is_right_for_every_row(T, widths, dtype):
    """By the prepared call, twice: the first one checks, the second one is bound."""
    s = Stacked.draw(T, 40, widths, 6, 4, dtype)
    layers = s.begin()
    with torch.inference_mode():
        for _ in range(2):
            y = s.y.clone()
            with unchanged(s.x, s.A, s.B):
                layers.add_linear(y, s.x, s.A, s.B, 1.0)
            assert_accurate(y, s.want(s.y, s.x, s.ids), s.unfused(s.y, s.x, s.ids), dtype)
    assert same_bits(y[s.ids == -1], s.y[s.ids == -1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_right_on_every_backend(dtype, backend, device):
    s = Stacked.draw(13, 40, WIDTHS, 6, 4, dtype, device)
    layers, y = s.begin(), s.y.clone()
    with torch.no_grad():
        layers.add_linear(y, s.x, s.A, s.B, 1.0)
    assert_accurate(y, s.want(s.y, s.x, s.ids), s.unfused(s.y, s.x, s.ids), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_adds_only_B(dtype):
    """h is what an embedding has looked up in A."""
    s = Stacked.draw(13, 40, (24,), 6, 4, dtype)
    h = signed(13, 6, dtype=dtype, device=torch.device("cpu"))
    y = s.y.clone()
    s.begin().add_expanded(y, (h,), s.B)
    eye = s._replace(A=(torch.eye(6, dtype=dtype).expand(4, 1, 6, 6),))
    assert_accurate(y, eye.want(s.y, h, s.ids), eye.unfused(s.y, h, s.ids), dtype)
    assert same_bits(y[s.ids == -1], s.y[s.ids == -1])


def test_expand_takes_the_place_of_what_was_there():
    s = Stacked.draw(9, 40, (24,), 6, 4, torch.float32)
    h = torch.randn(9, 6)
    y, wide = torch.zeros(9, 24), torch.full((9, 40), 7.0)
    s.begin().add_expanded(y, (h,), s.B)
    s.begin().add_expanded(wide, (h,), s.B, first=8, add=False)
    assert same_bits(wide[:, 8:32], y)
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 32:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_and_expand_make_linear(dtype):
    """As with fully sharded adapters, whose h waits in float32 for the other ranks' shares."""
    s = Stacked.draw(13, 40, WIDTHS, 6, 4, dtype)
    layers, y = s.begin(), s.y.clone()
    hs = [torch.zeros(13, 6) for _ in WIDTHS]
    layers.add_shrunk(hs, s.x, s.A, 1.0)
    for h, a in zip(hs, s.A, strict=True):
        exact = torch.stack([a[i, 0].double() @ x.double() if i >= 0 else torch.zeros(6)
                             for i, x in zip(s.ids.tolist(), s.x, strict=True)])  # fmt: skip
        torch.testing.assert_close(h.double(), exact, rtol=2e-2, atol=2e-2)
        assert not h[s.ids == -1].any()
    layers.add_expanded(y, hs, s.B)
    assert_accurate(y, s.want(s.y, s.x, s.ids), s.unfused(s.y, s.x, s.ids), dtype)


@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16])
def test_logits_of_requests_have_their_adapters(logits):
    s = Stacked.draw(13, 40, (24,), 6, 4, torch.bfloat16)
    requests = torch.tensor([2, -1, 0, 3])
    x = s.x[:4].clone()
    padded = torch.randn(4, 32).to(logits)  # a vocabulary is padded
    y = padded.clone()
    s.begin(requests).add_logits(y, x, s.A[0], s.B[0], 1.0)
    before = padded[:, :24]
    unfused = s.unfused(before.bfloat16(), x, requests)
    assert_accurate(y[:, :24].bfloat16(), s.want(before, x, requests), unfused, torch.bfloat16)
    assert same_bits(y[:, 24:], padded[:, 24:])


@pytest.mark.parametrize("first, last", [(0, 4), (3, 9), (9, 13)])
def test_logits_of_a_prompt_have_its_tokens_adapters(first, last):
    """Also where they are as many as there are requests, whose rows those would be."""
    s = Stacked.draw(13, 40, (24,), 6, 4, torch.float32)
    requests = torch.full((last - first,), 3)
    x, ids = s.x[first:last], s.ids[first:last]
    y = torch.randn(last - first, 24)
    before = y.clone()
    s.begin(requests).add_logits(y, x, s.A[0], s.B[0], 1.0)
    torch.testing.assert_close(y.double(), s.want(before, x, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lies", [lambda x: x[:5].clone(), lambda x: torch.cat([x, x])[2:6], lambda x: x[::3]]
)
def test_logits_are_refused_where_their_rows_cannot_be_told(lies):
    s = Stacked.draw(13, 40, (24,), 6, 4, torch.float32)
    x = lies(s.x)
    y = torch.randn(x.shape[0], 24)
    with unchanged(y), pytest.raises(RuntimeError, match="cannot tell whose"):
        s.begin(torch.tensor([0, 1])).add_logits(y, x, s.A[0], s.B[0], 1.0)


def test_written_slot_has_its_new_rank():
    """A slot is zeroed and written in place: by another adapter, or by the same one again."""
    s = Stacked.draw(8, 40, (24,), 6, 4, torch.float32)
    ids = torch.tensor([0, 1, 2, 3] * 2)
    layers = Layers()
    none = ids.new_empty(0)
    layers.begin(ids, none, [1, 2, 3, 4])

    def check() -> None:
        y = s.y.clone()
        layers.add_linear(y, s.x, s.A, s.B, 1.0)
        torch.testing.assert_close(y.double(), s.want(s.y, s.x, ids), rtol=1e-5, atol=1e-5)

    with torch.inference_mode():
        check()
        for adapters in ([1, 2, 3, 4], [1, 9, 3, 4]):
            s.A[0][1], s.B[0][1] = torch.randn(1, 6, 40), torch.randn(1, 24, 6)
            layers.begin(ids, none, adapters)
            check()
            s.A[0][1] = 0
            check()


def test_moved_weights_are_found():
    s = Stacked.draw(8, 40, (24,), 6, 4, torch.float32)
    layers = s.begin()
    with torch.inference_mode():
        for _ in range(2):
            layers.add_linear(s.y.clone(), s.x, s.A, s.B, 1.0)
        old = s.A[0].data
        s.A[0].data = torch.randn(4, 1, 6, 40)
        old.fill_(float("nan"))
        y = s.y.clone()
        layers.add_linear(y, s.x, s.A, s.B, 1.0)
    torch.testing.assert_close(y.double(), s.want(s.y, s.x, s.ids), rtol=1e-4, atol=1e-4)


def test_ranks_beyond_an_adapters_are_not_read(monkeypatch):
    """What the zeros past a rank would be multiplied with costs nothing: here it would be seen."""
    s = Stacked.draw(13, 40, WIDTHS, 6, 4, torch.float32)
    layers = s.begin()
    layers.add_linear(s.y.clone(), s.x, s.A, s.B, 1.0)
    for a, b in zip(s.A, s.B, strict=True):
        for slot, r in enumerate(s.ranks):
            a.data[slot, :, r:] = b.data[slot, :, :, r:] = float("nan")
    monkeypatch.setattr(vllm_layers.Layer, "follow", lambda *_: None)
    y = s.y.clone()
    layers.add_linear(y, s.x, s.A, s.B, 1.0)
    assert y.isfinite().all()


@pytest.mark.parametrize("K", [16, 13])
@pytest.mark.parametrize("dtype", DTYPES)
def test_count_ranks_finds_the_last_row_in_use(dtype, K):
    A = torch.zeros(6, K, dtype=dtype)
    assert count_ranks(A) == 0
    A[1, -1] = torch.finfo(dtype).tiny
    assert count_ranks(A) == 2
    A[4, 3] = float("nan")
    assert count_ranks(A) == 5


def test_nobody_with_an_adapter_costs_no_call(monkeypatch):
    s = Stacked.draw(5, 40, (24,), 6, 4, torch.float32)
    layers = Layers()
    layers.add_linear(s.y, s.x, s.A, s.B, 1.0)  # before any step
    none = torch.full((5,), -1)
    layers.begin(none, none, [1, None, 2, None])
    monkeypatch.setattr(Layers, "_add", None)
    with unchanged(s.y):
        layers.add_linear(s.y, s.x, s.A, s.B, 1.0)
        layers.add_expanded(s.y, (s.x[:, :6],), s.B)
        layers.add_logits(s.y, s.x, s.A[0], s.B[0], 1.0)


def test_rows_that_are_not_the_steps_are_refused():
    s = Stacked.draw(13, 40, (24,), 6, 4, torch.float32)
    layers = s.begin()
    for _ in range(2):
        with unchanged(s.y), pytest.raises(ValueError, match="adapter_ids: expected shape"):
            layers.add_linear(s.y[:4], s.x[:4], s.A, s.B, 1.0)
        layers.add_linear(s.y.clone(), s.x, s.A, s.B, 1.0)


def test_steps_keep_their_rows_when_vllm_writes_the_next_ones():
    s = Stacked.draw(13, 40, (24,), 6, 4, torch.float32)
    ids = s.ids.clone()
    layers = Layers()
    layers.begin(ids, ids, [1, 2, 3, 4])
    ids.fill_(2)
    y = s.y.clone()
    layers.add_logits(y, s.x, s.A[0], s.B[0], 1.0)
    torch.testing.assert_close(y.double(), s.want(s.y, s.x, s.ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_steps_in_lasting_memory_pad_their_rows(dtype, device):
    """As a GPU's graphs need them; the Triton kernels take rows in any order."""
    s = Stacked.draw(13, 40, WIDTHS, 6, 4, dtype, device)
    layers = Layers(DeviceSteps(32, device))
    with torch.no_grad(), fastlora.use_backend("triton"):
        for ids in (s.ids.flip(0), s.ids):
            layers.begin(ids, ids[:4], [1, 2, 3, 4])
            x, y = (torch.cat([t, torch.full_like(t[:7], 9)]) for t in (s.x, s.y))
            layers.add_linear(y, x, s.A, s.B, 1.0)
        ids = torch.cat([s.ids, torch.full((7,), -1, device=device)])
        before = torch.cat([s.y, torch.full_like(s.y[:7], 9)])
        assert_accurate(y, s.want(before, x, ids), s.unfused(before, x, ids), dtype)
        logits = s.y[:4].clone()
        layers.add_logits(logits, s.x[:4].clone(), s.A[0], s.B[0], 1.0)
        one = s._replace(A=s.A[:1], B=s.B[:1])
        before = s.y[:4, :24]
        assert_accurate(
            logits[:, :24], one.want(before, s.x[:4], s.ids[:4]),
            one.unfused(before, s.x[:4], s.ids[:4]), dtype,
        )  # fmt: skip
        assert same_bits(logits[:, 24:], s.y[:4, 24:])


def as_graph(layers: Layers, s: Stacked) -> Tensor:
    from fastlora.integrations.vllm import graph

    key = graph.add(layers)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        y = y * 1
        torch.ops.fastlora.vllm_add_linear_(y, x, list(s.A), list(s.B), 1.0, key)
        torch.ops.fastlora.vllm_add_expanded_(y, [x[:, :6]], [s.B[0]], 0, True, key)
        return y + 1

    with torch.inference_mode():
        return torch.compile(forward, backend="aot_eager", fullgraph=True)(s.x, s.y)


def test_compiled_graph_keeps_the_ops():
    """And looks up its step when it runs: another one's rows, not those it was traced with."""
    s = Stacked.draw(13, 40, (24,), 6, 4, torch.float32)
    layers = s.begin()
    eager = s.y.clone()
    layers.add_linear(eager, s.x, s.A, s.B, 1.0)
    layers.add_expanded(eager, (s.x[:, :6],), s.B)
    torch.testing.assert_close(as_graph(layers, s), eager + 1)
