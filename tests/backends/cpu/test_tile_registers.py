"""What calls by tiles leave behind: registers, MXCSR and torch's own AMX products as they were."""

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as nnf

from fastlora.backends import native
from tests.support import forks
from tests.support.helpers import same_bits

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)
from tests.support.tile_calls import BF16, Batch, equal_but_for_nan, threads

# A palette; 16 bytes a row and 5 rows in register 3, nothing in the others.
CONFIG = bytes([1, *[0] * 21, 16, *[0] * 28, 5, *[0] * 12])
LDTILECFG, STTILECFG = bytes.fromhex("c4e2784907c3"), bytes.fromhex("c4e2794907c3")
TILERELEASE = bytes.fromhex("c4e27849c0c3")
PROT = mmap.PROT_READ | mmap.PROT_WRITE | getattr(mmap, "PROT_EXEC", 0)


class Code:
    """Instructions that take a pointer and return, as a function."""

    def __init__(self, code: bytes) -> None:
        self.page = mmap.mmap(-1, mmap.PAGESIZE, prot=PROT)
        self.page.write(code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
        self.call = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address)


@pytest.fixture
def some_batches(hardware: str) -> Iterator[list[Batch]]:
    """One path each; and AMX in use."""
    native.use(hardware)
    one = [Batch.of(M, 70, 83, 16) for M in (1, 40, 130, 300)]
    return [*one, *(b.onto() for b in one)]


def call_all(batches: list[Batch]) -> None:
    for b in batches:
        b.one()
        b.multi(page=4)


def test_tile_registers_are_as_they_were_after_a_call(some_batches):
    load, store, release = Code(LDTILECFG), Code(STTILECFG), Code(TILERELEASE)
    for config in (CONFIG, bytes(64)):
        after = ctypes.create_string_buffer(64)
        load.call(config) if any(config) else release.call(None)
        for b in some_batches:
            b.one()
            store.call(ctypes.cast(after, ctypes.c_char_p))
            assert after.raw == config
    release.call(None)


@pytest.mark.parametrize("count", [1, 2])
def test_torch_amx_products_are_as_before_between_calls(count, some_batches):
    """Sizes that oneDNN takes AMX for, whole and with rests."""
    with threads(count):
        for M, K, N in ((64, 256, 256), (513, 515, 257), (1, 512, 512)):
            x, W = torch.randn(M, K).to(BF16), torch.randn(N, K).to(BF16)
            before = nnf.linear(x, W)
            for b in some_batches:
                want = b.one()
                assert same_bits(nnf.linear(x, W), before)
                assert all(same_bits(a, c) for a, c in zip(b.one(), want, strict=True))


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_subnormals_of_float32_are_as_the_caller_has_them(flush, count, tile_set):
    """Tiles make them zeros; MXCSR says so meanwhile, in every thread that computes."""
    b = Batch.of(130, 70, 203, 16, 3)
    want = b.multi()
    tiny = torch.full((1 << 18,), 1e-39)
    try:
        with threads(count):
            torch.set_flush_denormal(flush)
            seen = tiny * 1.5
            got = b.multi()
            assert same_bits(tiny * 1.5, seen)
            assert float(torch.tensor(1e-39) * 1.5 > 0) == (not flush)
    finally:
        torch.set_flush_denormal(False)
    assert all(same_bits(a, c) for a, c in zip(got, want, strict=True))


def test_threads_of_python_have_the_same_bits(tile_set):
    """Each has tile registers of its own."""
    batches = [Batch.of(M, 70, 83, 16, 3) for M in (1, 40, 130, 300)]
    want = [b.multi() for b in batches]
    wrong = []

    def work(b: Batch, expected: tuple) -> None:
        torch.set_num_threads(1)
        for _ in range(20):
            got = b.multi()
            if not all(equal_but_for_nan(a, c) for a, c in zip(got, expected, strict=True)):
                wrong.append(b)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(batches, want, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# Threads that are older than the permission for tiles have it too, and so has a forked child.
PROBE = """
import os, sys, threading
ready, results = threading.Event(), []

def work():
    ready.wait()
    results.append(compute())

older = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in older:
    thread.start()
import torch
from torch.nn import functional as nnf
from fastlora.backends import native
from tests.support.tile_calls import Batch
torch.set_num_threads(1)
native.use(sys.argv[1])
b, W = Batch.of(40, 70, 83, 16), torch.randn(256, 256).bfloat16()

def compute():
    torch.set_num_threads(1)
    product = nnf.linear(W, W)
    y, h = b.one()
    again = nnf.linear(W, W)
    return [t.float().tolist() for t in (product, y, h, again)]

want = compute()
ready.set()
for thread in older:
    thread.join()
younger = threading.Thread(target=work)
younger.start()
younger.join()
assert len(results) == 3 and all(result == want for result in results), "threads"
child = os.fork()
if child == 0:
    os._exit(0 if compute() == want else 1)
assert os.waitpid(child, 0)[1] == 0, "fork"
assert compute() == want
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_older_threads_and_forked_processes_have_the_same_bits(tile_set):
    run = forks.run(PROBE, tile_set, env=dict(os.environ))
    assert run.stdout == "same\n", run.stderr
