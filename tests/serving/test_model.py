"""MultiLoRAModel computes every row with its own adapter and no other."""

from __future__ import annotations

import itertools
from typing import Any

import peft
import pytest
import torch

from tests.serving.adapters import ADAPTERS, model_with_adapter, serve
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

MIX = ["alice", None, "bob", "carol", "__base__", "dave", "alice"]
pytestmark = quiet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch_gives_each_row_its_adapter(folder, dtype):
    server = serve(folder, *ADAPTERS, model=llama(dtype=dtype))
    ids = tokens(1, 6).repeat(len(MIX), 1)  # the same text, so that only adapters differ
    mixed = logits(server, ids, adapter_names=MIX)
    base = logits(llama(dtype=dtype), ids[:1])
    for row, name in enumerate(MIX):
        got = mixed[row : row + 1]
        by_itself = logits(server, ids[:1], adapter_names=[name])
        is_base = name in (None, "__base__")
        for want in (by_itself, logits(model_with_adapter(folder, name, dtype), ids[:1])):
            assert_agree(got, want, None if is_base else base)
    distinct = {name: mixed[row] for row, name in enumerate(MIX)}
    for one, other in itertools.combinations(set(MIX) - {None}, 2):
        assert error(distinct[one], distinct[other]) >= 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_server_matches_peft_adapter_names(folder, dtype):
    theirs: Any = peft.PeftModel.from_pretrained(llama(dtype=dtype), str(folder / "alice"), "alice")
    for name in ("bob", "carol", "dave"):
        theirs.load_adapter(str(folder / name), name)
    theirs.eval()
    ids = tokens(len(MIX), 6)
    want = logits(theirs, ids, adapter_names=[name or "__base__" for name in MIX])
    got = logits(serve(folder, *ADAPTERS, model=llama(dtype=dtype)), ids, adapter_names=MIX)
    assert_agree(got, want, logits(llama(dtype=dtype), ids))


def test_padded_rows_match_single_row_calls(folder):
    server, ids = serve(folder, "alice", "bob"), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    got = logits(server, ids, attention_mask=mask, adapter_names=["bob", "alice"])
    for row, name in enumerate(("bob", "alice")):
        want = logits(
            model_with_adapter(folder, name), ids[row : row + 1], attention_mask=mask[row : row + 1]
        )
        seen = mask[row].bool()
        assert error(got[row, seen], want[0, seen]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "names, kind, says",
    [
        (["alice", "eve"], ValueError, "no adapter 'eve' is loaded .loaded: alice, bob"),
        (["alice", 3], ValueError, "no adapter 3"),
        (["alice", ""], ValueError, "no adapter ''"),
        (["alice"], ValueError, "expected 2, one a row, got 1"),
        (["alice"] * 3, ValueError, "expected 2, one a row, got 3"),
        ([], ValueError, "got 0"),
        ("ab", TypeError, "expected a list"),
        (None, TypeError, "expected a list"),
        ({"alice": 0, "bob": 1}, TypeError, "expected a list"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_server_refuses_bad_adapter_names(folder, call, names, kind, says):
    server = serve(folder, "alice", "bob")
    with untouched(server), pytest.raises(kind, match=f"adapter_names: .*{says}"):
        getattr(server, call)(input_ids=tokens(2, 4), adapter_names=names)
    with pytest.raises(TypeError, match="adapter_names"):
        getattr(server, call)(input_ids=tokens(2, 4))


def test_inner_model_refuses_calls_without_adapter_names(folder):
    server = serve(folder, "alice")
    for _ in range(2):  # nor after a call, nor after one that failed
        with pytest.raises(RuntimeError, match="no adapters were named"):
            server.model(input_ids=tokens(1, 4))
        logits(server, tokens(1, 4), adapter_names=["alice"])
        with pytest.raises(ValueError, match="input_ids"):
            server(adapter_names=["alice"], input_ids=None, inputs_embeds=None, x=tokens(1, 4))


def test_server_replaces_unloads_and_evicts_adapters(folder):
    server = serve(folder, "alice", "bob", max_adapters=2)
    ids = tokens(1, 5)
    server.load_adapter(folder / "carol", "carol")  # known, though all places are taken
    for name in ("carol", "alice", "bob", "carol"):
        got = logits(server, ids, adapter_names=[name])
        assert_agree(got, logits(model_with_adapter(folder, name), ids))
    with untouched(server), pytest.raises(ValueError, match="max_adapters=2 different ones, got 3"):
        server(input_ids=ids.repeat(3, 1), adapter_names=["alice", "bob", "carol"])
    server.load_adapter(folder / "carol", "alice")  # a name of its own decides, not the file's
    assert server.adapters == ("alice", "bob", "carol")
    assert_agree(
        logits(server, ids, adapter_names=["alice"]),
        logits(model_with_adapter(folder, "carol"), ids),
    )
    server.unload_adapter("alice")
    server.unload_adapter("carol")
    assert server.adapters == ("bob",)
    for refused in (
        lambda: server.unload_adapter("alice"),
        lambda: server.unload_adapter("__base__"),
    ):
        with untouched(server), pytest.raises(ValueError, match=r"adapter_name: .*is loaded"):
            refused()
    with pytest.raises(ValueError, match="no adapter 'alice'"):
        server(input_ids=ids, adapter_names=["alice"])
    server.load_adapter(folder / "dave", "dave")
    assert_agree(
        logits(server, ids, adapter_names=["dave"]), logits(model_with_adapter(folder, "dave"), ids)
    )
    assert_agree(
        logits(server, ids, adapter_names=["bob"]), logits(model_with_adapter(folder, "bob"), ids)
    )
