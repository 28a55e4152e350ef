"""Tokens and log-probabilities of real vLLM with the plug-in, beside PEFT's."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.vllm_engine.conftest import make_prompts
from tests.integrations.vllm_engine.engine import Engine

# Of a log-probability, beyond twice the error of PEFT in the same dtype: sums over a model's layers
# in another order.
SLACK = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def check(done, prompts, adapters, exact, rounded, dtype) -> None:
    """Every token as likely as PEFT in float32 has it, and no other much likelier."""
    worst = allowed = 0.0
    for answer, prompt, adapter in zip(done, prompts, adapters, strict=True):
        tokens = prompt + answer["tokens"]
        want, peft = exact(adapter, tokens), rounded(adapter, tokens)
        places = torch.arange(len(prompt) - 1, len(tokens) - 1)
        chosen = torch.tensor(answer["tokens"])
        got = torch.tensor(answer["logprobs"])
        worst = max(worst, float((got - want[places, chosen]).abs().max()))
        worst = max(worst, float((want[places].amax(-1) - want[places, chosen]).max()) / 2)
        allowed = max(allowed, float((peft - want).abs().max()))
        if "prompt_logprobs" in answer:
            of_prompt = want[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
            given = torch.tensor(answer["prompt_logprobs"])
            worst = max(worst, float((given - of_prompt).abs().max()))
    assert worst <= 2 * allowed + SLACK[dtype], f"{worst:.1e}, PEFT itself {allowed:.1e}"


@pytest.fixture
def mixed(world):
    """Prompts of every adapter, and of the base, in one batch."""
    adapters = [*world.adapters, None, *reversed(world.adapters), None]
    return make_prompts(len(adapters)), adapters


def test_plugin_is_on_and_says_so(engine):
    log = engine.log.read_text()
    assert "fastlora applies LoRA of linear, embedding and logits layers" in log
    assert "Using PunicaWrapperFastLoRA" in log
    assert "stands aside" not in log


def test_mixed_batch_has_numbers_of_peft(engine, mixed, exact, rounded, dtype):
    """With all slots full, where rows without an adapter are vLLM's own weak spot."""
    done = engine.generate(*mixed, max_tokens=6)
    check(done, *mixed, exact, rounded, dtype)
    adapted = [a["tokens"] for a in done]
    base = engine.generate(mixed[0], [None] * len(mixed[0]), max_tokens=6)
    differ = [one != other["tokens"] for one, other in zip(adapted, base, strict=True)]
    assert sum(differ) >= 8  # the adapters do something
    assert not differ[6]
    assert not differ[13]


def test_same_batch_has_same_bits(engine, mixed):
    first, again = (engine.generate(*mixed, max_tokens=6) for _ in range(2))
    assert first == again


def test_prompt_logprobs_have_each_rows_adapter(engine, mixed, exact, rounded, dtype):
    done = engine.generate(*mixed, max_tokens=2, prompt_logprobs=0)
    assert all(len(a["prompt_logprobs"]) == len(p) - 1 for a, p in zip(done, mixed[0], strict=True))
    check(done, *mixed, exact, rounded, dtype)


def test_fewer_slots_than_adapters(narrow, world, exact):
    """Adapters make room for each other between steps; ranks are a quarter of the highest."""
    adapters = [*world.adapters, None, *world.adapters]
    prompts = make_prompts(len(adapters), start=5)
    done = narrow.generate(prompts, adapters, max_tokens=5, prompt_logprobs=0)
    check(done, prompts, adapters, exact, exact, torch.float32)


def test_replaced_and_removed_adapters_are_gone(narrow, world, exact):
    """A name's adapter of rank 1 gives way to one of rank 16, in the slot that it has."""
    low, high = world.adapters[1], world.adapters[4]
    prompts = make_prompts(3, start=9)
    narrow.generate(prompts, [low] * 3, max_tokens=3)
    narrow.replace(low, high)
    done = narrow.generate(prompts, [low] * 3, max_tokens=5)
    check(done, prompts, [high] * 3, exact, exact, torch.float32)
    narrow.forget(low)
    done = narrow.generate(prompts, [low, None, high], max_tokens=5)
    check(done, prompts, [low, None, high], exact, exact, torch.float32)


def test_embedding_and_head_have_their_adapters(world, exact, tmp_path):
    engine = Engine(world.model, tmp_path / "log", dtype="float32", max_loras=3, max_lora_rank=16)
    try:
        adapters = [*world.wide, None, world.adapters[0], world.wide[0]]
        prompts = make_prompts(len(adapters), start=2)
        done = engine.generate(prompts, adapters, max_tokens=5, prompt_logprobs=0)
    finally:
        engine.close()
    check(done, prompts, adapters, exact, exact, torch.float32)


def test_compiled_model_has_same_numbers(world, exact, tmp_path):
    """Switched on by a variable: vLLM itself compiles no model with LoRA on a CPU."""
    engine = Engine(
        world.model, tmp_path / "log", dtype="float32", max_loras=6, max_lora_rank=16,
        enforce_eager=False, variables={"FASTLORA_VLLM_COMPILE": "1"},
    )  # fmt: skip
    try:
        adapters = [*world.adapters, None]
        prompts = make_prompts(len(adapters), start=3)
        done = engine.generate(prompts, adapters, max_tokens=5, prompt_logprobs=0)
        check(done, prompts, adapters, exact, exact, torch.float32)
        done = engine.generate(prompts, adapters[::-1], max_tokens=5)
        check(done, prompts, adapters[::-1], exact, exact, torch.float32)
    finally:
        engine.close()
    assert "DYNAMO_TRACE_ONCE" in engine.log.read_text()


def test_vllms_own_lora_runs_where_it_is_switched_off(world, exact, tmp_path):
    """And gives rows without an adapter their own numbers only where a slot is free."""
    how = {"dtype": "float32", "max_loras": 7, "max_lora_rank": 16}
    engine = Engine(world.model, tmp_path / "log", own=True, **how)
    try:
        adapters = [*world.adapters, None]
        prompts = make_prompts(len(adapters))
        done = engine.generate(prompts, adapters, max_tokens=5)
    finally:
        engine.close()
    assert "Using PunicaWrapperCPU" in engine.log.read_text()
    check(done, prompts, adapters, exact, exact, torch.float32)


def test_adapter_above_the_highest_rank_is_refused_as_vllm_does(world, exact, tmp_path):
    engine = Engine(world.model, tmp_path / "log", dtype="float32", max_loras=2, max_lora_rank=8)
    try:
        with pytest.raises(RuntimeError, match="rank"):
            engine.load(world.adapters[0])
        adapters = [world.adapters[1], None]
        done = engine.generate(make_prompts(2), adapters, max_tokens=3)
    finally:
        engine.close()
    check(done, make_prompts(2), adapters, exact, exact, torch.float32)
