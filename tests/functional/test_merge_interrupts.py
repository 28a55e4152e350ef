"""Ctrl-C while weights are merged, unmerged or swapped: all of it has happened, or nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

import fastlora
from fastlora import functional as F
from fastlora.backends import interrupts
from fastlora.modules.layer import find_lora_layers
from fastlora.modules.linear import FastLoRALinear
from tests.support.calls import weight_and_adapter
from tests.support.helpers import same_bits
from tests.support.models import randomise_lora

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """A shell's background jobs are started with SIGINT ignored, which Python then leaves so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run_with_interrupt(act, after: float) -> bool:
    """Runs act, Ctrl-C on its way; whether it raised."""

    def kill():
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=kill)
    try:
        thread.start()
        act()
        thread.join()
        time.sleep(0.001)
    except KeyboardInterrupt:
        return True
    finally:
        thread.join()
    return False


def model(width: int) -> torch.nn.Module:
    torch.manual_seed(3)
    layers = [FastLoRALinear(width, width, r=4, dtype=torch.bfloat16) for _ in range(6)]
    return randomise_lora(torch.nn.Sequential(*layers))


def state(m: torch.nn.Module):
    return [(layer.merged, layer.weight.detach().clone()) for _, layer in find_lora_layers(m)]


def have_same_bits(a, b) -> bool:
    return all(m == n and same_bits(v, w) for (m, v), (n, w) in zip(a, b, strict=True))


@pytest.mark.parametrize("step", ["merge_adapter", "unmerge_adapter"])
def test_interrupted_model_is_merged_whole_or_not(step, merge_backend):
    if merge_backend == "triton":
        pytest.skip("interpreted: too slow to be interrupted often")
    undone, width = 0, 64 if merge_backend == "cuda" else 256  # on the host its kernels are slow
    for round_ in range(400):
        # On a busy machine most come too late: as many as it takes for one to come in time.
        if undone and round_ >= (5 if merge_backend == "cuda" else 25):
            break
        m = model(width)
        if step == "unmerge_adapter":
            fastlora.merge_adapter(m)
        before = state(m)
        began = time.perf_counter()
        getattr(fastlora, step)(m)
        took, after = time.perf_counter() - began, state(m)
        fastlora.merge_adapter(m) if step == "unmerge_adapter" else fastlora.unmerge_adapter(m)
        run_with_interrupt(lambda m=m: getattr(fastlora, step)(m), took * (round_ % 13) / 10)
        now = state(m)
        assert have_same_bits(now, before) or have_same_bits(now, after)
        undone += have_same_bits(now, before)
    assert undone


def test_deferred_interrupt_is_raised_at_next_check():
    reached = []

    def work():
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            with interrupts.deferred():
                reached.append("the inner end")
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()
            interrupts.check()  # heard once
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["the inner end", "the end"]
    handler = signal.getsignal(signal.SIGINT)
    assert handler is signal.default_int_handler


def test_deferral_leaves_other_threads_alone():
    weight, adapter = weight_and_adapter(64, 64, 4, torch.bfloat16)
    before, errors = weight.clone(), []

    def work():
        try:
            F.unmerge_(weight, F.merge_(weight, [adapter]))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert same_bits(weight, before)
