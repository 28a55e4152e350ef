"""Random batches by the hundred match the oracle while slots are reloaded and emptied."""

# Every row must be its own adapter's, told from any other one by a margin; slots and pages that
# nobody has are NaN, and so is what lies past a slot's rank.

import math
import os
import random

import pytest
import torch
from torch import Tensor

from benchmarks.suites.workloads import PHASES, WORKLOADS, draw_adapter_ids
from fastlora import functional as F
from fastlora.ops import availability
from tests.support import oracle
from tests.support.helpers import signed

K, N, R, S, PAGE = 24, 20, 6, 5, 2
# More for whoever has the time: FASTLORA_TEST_BATCHES=2000, a number for each backend and dtype.
BATCHES = int(os.environ.get("FASTLORA_TEST_BATCHES", "0"))
# Interpreted kernels take a hundred times a native one's time.
COUNTS = {"torch": 150, "cpu": 500, "triton": 25}
# A row's error over its length, and how far two adapters' rows are apart at least.
NEAR, APART = {torch.float32: 1e-5, torch.bfloat16: 4e-2}, 0.1


class Store:
    """Adapters in slots, dense and in pages at once; what is free holds NaN."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.kind = {"dtype": dtype, "device": device}
        self.lora_A = torch.full((S, R, K), math.nan, **self.kind)
        self.lora_B = torch.full((S, N, R), math.nan, **self.kind)
        pages = S * (R // PAGE) + 2
        self.pages_A = torch.full((pages, PAGE, K), math.nan, **self.kind)
        self.pages_B = torch.full((pages, PAGE, N), math.nan, **self.kind)
        self.table = torch.full((S, R // PAGE), -1, dtype=torch.int32, device=device)
        self.ranks = torch.zeros(S, dtype=torch.int32, device=device)
        self.scalings = torch.full((S,), math.nan, dtype=torch.float32, device=device)
        self.free = list(range(pages))
        # What each slot is meant to hold, kept apart from all of the above.
        self.meant: dict[int, tuple[Tensor, Tensor, float]] = {}

    def drop(self, slot: int) -> None:
        self.meant.pop(slot, None)
        for page in self.table[slot].tolist():
            if page >= 0:
                self.pages_A[page] = self.pages_B[page] = math.nan
                self.free.append(page)
        self.lora_A[slot] = self.lora_B[slot] = self.scalings[slot] = math.nan
        self.table[slot], self.ranks[slot] = -1, 0

    def load(self, slot: int) -> None:
        """Another adapter, of another rank, whose delta is about as large as the base's output."""
        self.drop(slot)
        r = random.randint(1, R)
        A = signed(r, K, **self.kind, size=K**-0.5)
        B, scaling = signed(N, r, **self.kind, size=r**-0.5), random.choice((-1.5, 1.5))
        self.meant[slot] = A, B, scaling
        self.lora_A[slot, :r], self.lora_B[slot, :, :r] = A, B
        self.ranks[slot], self.scalings[slot] = r, scaling
        random.shuffle(self.free)
        for i in range(-(-r // PAGE)):
            page, size = self.free.pop(), min(PAGE, r - i * PAGE)
            self.table[slot, i] = page
            self.pages_A[page, :size] = A[i * PAGE : i * PAGE + size]
            self.pages_B[page, :size] = B[:, i * PAGE : i * PAGE + size].T

    def ids(self) -> Tensor:
        """Of loaded slots, as a server's batches have them; some rows have none."""
        rows = random.choice((1, 2, 3, 8, 17, 33))
        workload, phase = random.choice(WORKLOADS), random.choice(PHASES)
        how = {"phase": phase, "without": random.choice((0.0, 0.3)), "seed": random.getrandbits(32)}
        drawn = draw_adapter_ids(workload, rows, max(1, len(self.meant)), **how)
        loaded = torch.tensor([*self.meant, -1])
        return loaded[drawn if self.meant else torch.full_like(drawn, -1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_batches_give_rows_their_own_adapter(dtype, backend, device):
    count, store, told = BATCHES or COUNTS[backend], Store(dtype, device), 0
    random.seed(int(torch.randint(2**31, ())))
    weight = signed(N, K, dtype=dtype, device=device, size=K**-0.5)
    for number in range(count):
        change = random.choice((store.load, store.load, store.drop, None))
        if change is not None:
            change(random.randrange(S))
        ids = store.ids()
        x = signed(len(ids), K, dtype=dtype, device=device)
        paged = number % 2 == 1
        how = {"ranks": store.ranks, "page_table": store.table if paged else None}
        factors = (store.pages_A, store.pages_B) if paged else (store.lora_A, store.lora_B)
        given = (*factors, ids.to(device), store.scalings)
        with torch.no_grad():
            if number % 3 == 2:
                y = F.multi_lora_add_(x @ weight.T, x, *given, **how)
            else:
                y = F.multi_lora_linear(x, weight, *given, **how)
        told += assert_rows(y, x, weight, ids, store, NEAR[dtype])
    assert told > count / 4


def assert_rows(
    y: Tensor, x: Tensor, weight: Tensor, ids: Tensor, store: Store, near: float
) -> int:
    """How many rows were told from what another adapter would have made of them."""
    base = oracle.lora_linear(x, weight, x[:0], weight[:, :0], 0.0)
    deltas = {-1: torch.zeros_like(base)} | {
        slot: oracle.lora_linear(x, None, *adapter) for slot, adapter in store.meant.items()
    }
    got, told = y.cpu().double(), 0
    for row, slot in enumerate(ids.tolist()):
        want = base[row] + deltas[slot][row]
        error = (got[row] - want).norm()
        scale = max(want.norm(), base[row].norm())
        assert error <= near * scale, f"row {row} of slot {slot} errs by {error / scale:.1e}"
        others = [(d[row] - deltas[slot][row]).norm() for s, d in deltas.items() if s != slot]
        told += bool(others) and min(others) > APART * scale
    return told


def test_ids_out_of_range_never_reach_memory(device):
    """Where nobody may look at them, an id out of range is none; on the host it is an error."""
    x, weight = (signed(n, K, dtype=torch.float32, device=device) for n in (4, N))
    A, B = torch.full((1, R, K), math.nan), torch.full((1, N, R), math.nan)
    ids = torch.tensor([-1, 5, -7, 2**31 - 1], device=device)
    given = (x, weight, A.to(device), B.to(device), ids, torch.ones(1, device=device))
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"adapter_ids: expected ids in \[-1, 1\), got 5"):
            F.multi_lora_linear(*given)
    else:
        torch.testing.assert_close(F.multi_lora_linear(*given), x @ weight.T)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 48, 700])
def test_cuda_graph_follows_slots_and_ids_changed(rows):
    """Captured once; then adapters are swapped in their slots and ids changed, in place."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    device = torch.device("cuda")
    reason = availability.cannot("triton", device)
    if reason is not None:
        pytest.skip(reason)
    from fastlora import use_backend

    store = Store(torch.bfloat16, device)
    weight = signed(N, K, dtype=torch.bfloat16, device=device)
    x, ids = signed(rows, K, dtype=torch.bfloat16, device=device), torch.zeros(rows, device=device)
    ids = ids.to(torch.int32).fill_(-1)

    def step() -> list[Tensor]:
        groups = F.group_rows(ids, S)
        dense = (store.lora_A, store.lora_B, groups, store.scalings)
        pages = (store.pages_A, store.pages_B, groups, store.scalings)
        one = F.multi_lora_linear(x, weight, *dense, ranks=store.ranks)
        how = {"ranks": store.ranks, "page_table": store.table}
        return [one, F.multi_lora_linear(x, weight, *pages, **how)]

    with torch.no_grad(), use_backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for _ in range(10):
            for slot in range(S):
                random.choice((store.load, store.drop))(slot)
            loaded = torch.tensor([*store.meant, -1], dtype=torch.int32)
            ids.copy_(loaded[torch.randint(len(loaded), (rows,))])
            x.normal_()
            graph.replay()
            for y in out:
                assert_rows(y, x, weight, ids.cpu(), store, NEAR[torch.bfloat16])
