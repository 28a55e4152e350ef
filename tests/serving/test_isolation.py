"""MultiLoRAModel lets nothing of one adapter reach another, whatever the pages hold."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import MultiLoRALinear, MultiLoRAModel
from fastlora.modules.routing import Routing
from fastlora.ops import availability
from tests.serving.adapters import ADAPTERS, adapt, model_with_adapter, serve
from tests.support.helpers import same_bits, unchanged
from tests.support.models import (
    TOLERANCE,
    assert_agree,
    error,
    llama,
    logits,
    quiet,
    tokens,
    untouched,
)

pytestmark = quiet


NAN = float("nan")


def arena_of(server: MultiLoRAModel) -> Tensor:
    (arena,) = server.bank._shelf.device.arenas.values()
    return arena.buffer


def test_unloaded_adapter_leaves_pages_empty(folder):
    server = serve(folder, "alice", max_adapters=1)
    assert bool(arena_of(server).any())
    server.unload_adapter("alice")
    assert not bool(arena_of(server).any())
    (tables,) = server.bank._shelf.device.tables.values()
    assert not bool(tables.ranks.any() | tables.scalings.any())
    assert bool((tables.pages == -1).all())


@pytest.mark.parametrize("name", ADAPTERS)
def test_nan_in_free_pages_reaches_no_row(folder, name):
    """Nor does what lies past an adapter's rank, or beside it in its pages."""
    server = serve(folder, "alice", max_adapters=3)
    taken = arena_of(server) != 0
    arena_of(server)[~taken] = NAN  # what is zero in alice's own pages too: padding
    ids = tokens(3, 5)
    got = logits(server, ids, adapter_names=["alice", None, "alice"])
    arena_of(server)[~taken] = 0
    server.load_adapter(folder / name, "new")
    taken = arena_of(server) != 0
    arena_of(server)[~taken] = NAN
    got = [got, logits(server, ids, adapter_names=["new", None, "new"])]
    for logits_of, who in zip(got, ("alice", name), strict=True):
        for rows, wanted in (
            (logits_of[::2], model_with_adapter(folder, who)),
            (logits_of[1:2], llama()),
        ):
            assert_agree(rows, logits(wanted, ids[::2] if len(rows) == 2 else ids[1:2]))


def test_nan_in_one_adapter_stays_in_its_rows(folder):
    server = serve(folder, "alice", "bob", max_adapters=4)
    ids, names = tokens(4, 5), ["alice", "bob", None, "alice"]
    want = logits(server, ids, adapter_names=names)
    resident = {entry.name: entry for entry in server.bank._shelf.resident}
    ((arena, blocks),) = (
        (server.bank._shelf.device.arenas[kind], blocks)
        for kind, blocks in resident["bob"].blocks.items()
    )
    for first, size in blocks:
        arena.part(first, size).fill_(NAN)
    got = logits(server, ids, adapter_names=names)
    assert same_bits(got[[0, 2, 3]], want[[0, 2, 3]])
    assert not bool(got[1].isfinite().any())


SAVED = {
    "rank above max_rank": ({"r": 9, "target_modules": ["q_proj"]}, "at most 8, got 9"),
    "rank pattern above": (
        {"r": 2, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 64}},
        "at most 8, got 64",
    ),
    "lora_bias": ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias=True"),
    "bias": ({"target_modules": ["q_proj"], "bias": "all"}, "bias='all'"),
    "layer that is not served": ({"target_modules": ["q_proj", "lm_head"]}, "for lm_head"),
}


@pytest.mark.parametrize("what", SAVED)
def test_load_adapter_refuses_unservable_adapters(folder, tmp_path, what):
    options, says = SAVED[what]
    fastlora.save_adapter(adapt(llama(), options), tmp_path)
    server = serve(folder, "alice")
    for name in ("alice", "new"):
        with untouched(server), pytest.raises(ValueError, match=says):
            server.load_adapter(tmp_path, name)
    assert server.adapters == ("alice",)
    with untouched(server), pytest.raises(ValueError, match="means the base"):
        server.load_adapter(folder / "alice", "__base__")


def test_server_threads_never_mix_adapters(folder):
    server, ids = serve(folder, *ADAPTERS), tokens(2, 6)
    mixes = [["alice", "bob"], ["carol", None], ["dave", "dave"]]
    want = [logits(server, ids, adapter_names=mix) for mix in mixes]
    start, wrong = threading.Barrier(len(mixes)), []

    def work(index: int) -> None:
        start.wait()
        for _ in range(15):
            got = logits(server, ids, adapter_names=mixes[index])
            if not error(got, want[index]) <= TOLERANCE[torch.float32]:
                wrong.append(mixes[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copied_and_cast_servers_serve_adapters(folder):
    server, ids = serve(folder, "alice", "bob"), tokens(2, 5)
    names = ["bob", "alice"]
    want = logits(server, ids, adapter_names=names)
    twin = copy.deepcopy(server)
    server.unload_adapter("bob")
    assert same_bits(logits(twin, ids, adapter_names=names), want)
    half = logits(twin.to(torch.bfloat16), ids, adapter_names=names)
    assert error(half, want) <= TOLERANCE[torch.bfloat16]
    assert arena_of(twin).dtype == torch.bfloat16
    assert same_bits(logits(pickle.loads(pickle.dumps(twin)), ids, adapter_names=names), half)


def test_batch_without_adapters_launches_no_lora_kernel(monkeypatch):
    """LoRA that is on and not used costs nothing: no kernel for adapters is launched."""
    if availability.cannot("triton", torch.device("cpu")) is not None:
        pytest.skip("Triton kernels are not interpreted here")
    from fastlora.backends.triton import multi

    layer = MultiLoRALinear.from_linear(nn.Linear(8, 6), 2, 3)
    layer.set_adapter(0, torch.randn(3, 8), torch.randn(6, 3), 1.0)
    routing, x, ran = Routing("name them"), torch.randn(4, 8), []
    layer.routing = routing.group_input
    real = multi.run
    monkeypatch.setattr(multi, "run", lambda *a: (ran.append(a[1]), real(*a)))
    with fastlora.use_backend("triton"), torch.no_grad():
        with routing.run_batch([-1, -1], 2, copies=2):
            assert same_bits(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
            assert not ran
            with fastlora.batch_invariant():
                alone = layer(x)
        with routing.run_batch([-1, 0, -1, 1], 2), fastlora.batch_invariant():
            assert same_bits(layer(x)[[0, 2]], alone[[0, 2]])
    assert ran == ["multi_lora_linear"] * 2
    # In training too nobody's rows have gradients to give: of the adapters, zeros.
    layer.lora_A.requires_grad_()
    with fastlora.use_backend("triton"), routing.run_batch([-1, -1], 2, copies=2):
        layer(x).sum().backward()
    assert not layer.lora_A.grad.any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"scaling": 1e39}, ValueError, "scaling: expected a number that float32 holds"),
        ({"scaling": float("nan")}, ValueError, "scaling"),
        (
            {"lora_A": torch.zeros(2, 8, device="meta")},
            TypeError,
            "lora_A: expected a dense tensor",
        ),
        ({"lora_B": torch.zeros(6, 2).to_sparse()}, TypeError, "lora_B: expected a dense tensor"),
        ({"lora_A": [[1]]}, TypeError, "lora_A: expected a tensor of floats, got list"),
        ({"lora_A": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "of floats, got torch.int64"),
        ({"slot": True}, TypeError, "slot: expected an int, got bool"),
        ({"slot": "1"}, TypeError, "slot: expected an int, got str"),
        ({"slot": 2}, ValueError, "slot: expected one of 0 to 1, got 2"),
    ],
)
def test_set_adapter_error_leaves_slot_unchanged(change, error, message):
    layer = MultiLoRALinear.from_linear(nn.Linear(8, 6), 2, 3)
    layer.set_adapter(1, torch.randn(3, 8), torch.randn(6, 3), 1.0)
    given = {"slot": 1, "lora_A": torch.zeros(2, 8), "lora_B": torch.zeros(6, 2), "scaling": 0.5}
    with unchanged(*layer.buffers()), pytest.raises(error, match=message):
        layer.set_adapter(**{**given, **change})


def test_set_adapter_accepts_views_of_its_own_slot():
    layer = MultiLoRALinear.from_linear(nn.Linear(8, 6), 2, 3)
    A, B = torch.randn(3, 8), torch.randn(6, 3)
    layer.set_adapter(1, A, B, 1.0)
    layer.set_adapter(1, layer.lora_A[1, :2], layer.lora_B[1, :, :2], 0.5)
    assert torch.equal(layer.lora_A[1, :2], A[:2])
    assert torch.equal(layer.lora_B[1, :, :2], B[:, :2])
    assert not layer.lora_A[1, 2:].any()
    assert (int(layer.ranks[1]), float(layer.scalings[1])) == (2, 0.5)
