"""Merges, swaps, unmerges, stacks and mistakes in any order that hypothesis draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fastlora import functional as F
from fastlora.ops import availability, dispatch
from tests.support.calls import weight_and_adapter
from tests.support.helpers import LAYOUTS, bits, unchanged

CPU = torch.device("cpu")
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
RATIOS = st.floats(-3, 0).map(lambda power: 10**power)
NUMBERS = [0.0, -0.0, 1e-39, -6e-8, float("inf"), -float("inf"), float("nan"), 1.0]


class Weight(RuleBasedStateMachine):
    """A weight and what is merged into it, beside a model of both: the bits before each merge."""

    @initialize(
        N=st.integers(0, 20), K=st.integers(0, 20), dtype=st.sampled_from(FLOATS),
        layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**32),
        numbers=st.lists(st.sampled_from(NUMBERS), max_size=8),
    )  # fmt: skip
    def begin(self, N, K, dtype, layout, seed, numbers):
        torch.manual_seed(seed)
        plain, _ = weight_and_adapter(N, K, 1, dtype)
        plain.view(-1)[: len(numbers)] = torch.tensor(numbers, dtype=dtype)[: N * K]
        self.weight, self.held = layout(plain), []
        self.now = bits(self.weight).clone()

    def adapter(self, ratio: float, rank: int, lora: torch.dtype):
        shape = self.weight.shape
        return weight_and_adapter(*shape, rank, self.weight.dtype, CPU, ratio, lora_dtype=lora)[1]

    @rule(ratio=RATIOS, rank=st.integers(0, 6), lora=st.sampled_from(FLOATS))
    def merge(self, ratio, rank, lora):
        receipt = F.merge_(self.weight, [self.adapter(ratio, rank, lora)])
        self.held.append((self.now, receipt))
        self.now = bits(self.weight).clone()

    @precondition(lambda self: self.held)
    @rule(ratio=RATIOS, rank=st.integers(0, 6), count=st.integers(0, 2))
    def swap(self, ratio, rank, count):
        before, receipt = self.held.pop()
        new = [self.adapter(ratio, rank, torch.float32) for _ in range(count)]
        self.held.append((before, F.swap_(self.weight, receipt, new)))
        want = before.view(self.weight.dtype).clone()
        F.merge_(want, new, receipt=False)
        assert torch.equal(bits(self.weight), bits(want))
        self.now = bits(self.weight).clone()

    @precondition(lambda self: self.held)
    @rule()
    def unmerge(self):
        self.now, receipt = self.held.pop()
        F.unmerge_(self.weight, receipt)

    @precondition(lambda self: len(self.held) > 1 and self.weight.numel())
    @rule()
    def unmerge_out_of_order(self):
        """Refused, unless what was merged since has changed nothing."""
        _, receipt = self.held[-2]
        if not torch.equal(self.held[-1][0], self.now):
            with unchanged(self.weight), pytest.raises(RuntimeError):
                F.unmerge_(self.weight, receipt)

    @precondition(lambda self: self.held and self.weight.numel())
    @rule(place=st.integers(0, 399), bit=st.integers(0, 15))
    def edit(self, place, bit):
        """A flipped bit is found, and flipped again is none."""
        place = (place // 20 % self.weight.shape[0], place % self.weight.shape[1])
        raw = self.weight.view(self.now.dtype)
        raw[place] ^= 1 << min(bit, 14)
        with unchanged(self.weight), pytest.raises(RuntimeError):
            F.unmerge_(self.weight, self.held[-1][1])
        raw[place] ^= 1 << min(bit, 14)

    @invariant()
    def the_bits_are_as_they_should_be(self):
        assert torch.equal(bits(self.weight), self.now)

    def teardown(self):
        while getattr(self, "held", None):
            self.unmerge()
            self.the_bits_are_as_they_should_be()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_weight_matches_model_after_any_steps(backend):
    reason = availability.cannot(backend, CPU)
    if reason is not None:
        pytest.skip(reason)
    chosen = settings(
        max_examples=40, stateful_step_count=30, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    with dispatch.use_backend(backend):
        run_state_machine_as_test(Weight, settings=chosen)
