"""The one list of cases: the command line, pytest and the tests all read it.

CPU sizes keep the whole list at five minutes or so on two cores. CUDA sizes are those of a layer
4096 wide; the most telling come first, in case the run is cut short.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial

from benchmarks.harness.case import Case
from benchmarks.suites.generate import Generate
from benchmarks.suites.linear import Linear, LinearAdd
from benchmarks.suites.merge import Merge, Swap
from benchmarks.suites.model import Train
from benchmarks.suites.multi import Multi
from benchmarks.suites.overhead import Overhead, OverheadMulti

SUITES = ("linear", "multi", "merge", "model", "overhead")

FORWARD, TRAIN = Linear(backward=False), Linear(backward=True)
NATIVE = Linear(backward=False, natively=True)
INVARIANT, ADD = Linear(backward=False, invariant=True), LinearAdd()
DECODE, PREFILL, MIXED = Multi("decode"), Multi("prefill"), Multi("mixed")
MODEL, GENERATE_ONE, GENERATE = Train(), Generate(one=True), Generate(one=False)
CALL, CALL_TRAIN, CALL_MULTI = Overhead(backward=False), Overhead(backward=True), OverheadMulti()
MERGE, MERGE_UNMERGE, SWAP = Merge(unmerge=False), Merge(unmerge=True), Swap()


def _make_square(size: int) -> dict[str, int]:
    return {"K": size, "N": size, "R": 16}


_WIDE, _NARROW = _make_square(2048), _make_square(1024)
# A model of few calls of Python, the demo's, and a block of Llama 3 8B.
_SMALL = {"H": 384, "I": 1024, "layers": 2, "R": 8}
_DEMO = {"H": 192, "I": 512, "layers": 4, "R": 8}
_WRITTEN = {"B": 8, "L": 8, "new": 4}
_BLOCK = {"H": 4096, "I": 14336, "layers": 1, "R": 16}


def _list_overhead(device: str, dtype: str) -> tuple[Case, ...]:
    small = {"K": 64, "N": 64, "R": 8}
    rows = {"T": 4, **small, "S": 4}
    return (
        Case(CALL, device, dtype, {"M": 1, **small}, quick=True, compiled=True),
        Case(CALL_TRAIN, device, dtype, {"M": 1, **small}, compiled=True),
        # On a CPU the others have shown what compilation does to a call: it takes its time.
        Case(CALL_MULTI, device, dtype, rows, workload="distinct", compiled=device == "cuda"),
    )


CPU = (
    Case(FORWARD, "cpu", "bf16", {"M": 1, **_WIDE}, quick=True, compiled=True),
    Case(FORWARD, "cpu", "bf16", {"M": 1, **_make_square(4096)}),
    Case(FORWARD, "cpu", "fp32", {"M": 4, **_make_square(4096)}),
    Case(FORWARD, "cpu", "bf16", {"M": 16, **_make_square(4096)}),
    Case(FORWARD, "cpu", "bf16", {"M": 512, **_NARROW}, lora_dtype="fp32"),
    Case(FORWARD, "cpu", "bf16", {"M": 512, **_WIDE}, lora_dtype="fp32"),
    Case(FORWARD, "cpu", "bf16", {"M": 512, **_make_square(4096)}, lora_dtype="fp32"),
    Case(FORWARD, "cpu", "fp32", {"M": 512, **_NARROW}, compiled=True),
    Case(FORWARD, "cpu", "bf16", {"M": 512, **_NARROW}),
    Case(TRAIN, "cpu", "fp32", {"M": 512, **_NARROW}, quick=True, compiled=True),
    Case(TRAIN, "cpu", "fp32", {"M": 512, **_NARROW}, dropout=0.1),
    Case(TRAIN, "cpu", "bf16", {"M": 512, **_NARROW}),
    Case(TRAIN, "cpu", "bf16", {"M": 512, **_NARROW}, lora_dtype="fp32"),
    Case(TRAIN, "cpu", "bf16", {"M": 512, **_WIDE}, lora_dtype="fp32"),
    Case(TRAIN, "cpu", "bf16", {"M": 512, **_make_square(4096)}, lora_dtype="fp32"),
    *(
        Case(DECODE, "cpu", dtype, {"T": 32, **_make_square(size), "S": 32}, workload="distinct")
        for dtype, size in (("bf16", 4096), ("bf16", 2048), ("bf16", 1024), ("fp32", 2048))
    ),
    Case(DECODE, "cpu", "bf16", {"T": 16, **_WIDE, "S": 8}, workload="uniform", quick=True),
    Case(DECODE, "cpu", "fp32", {"T": 16, **_WIDE, "S": 16}, workload="distinct"),
    Case(DECODE, "cpu", "fp32", {"T": 64, **_NARROW, "S": 32}, workload="zipf"),
    Case(PREFILL, "cpu", "bf16", {"B": 8, "L": 128, **_WIDE, "S": 16}, workload="uniform"),
    Case(
        PREFILL,
        "cpu",
        "fp32",
        {"B": 4, "L": 128, **_NARROW, "S": 4},
        workload="zipf",
        compiled=True,
    ),
    Case(MIXED, "cpu", "fp32", {"T": 128, **_NARROW, "S": 8}, workload="skewed"),
    *(
        Case(NATIVE, "cpu", dtype, {"M": M, **_make_square(size)}, full=True)
        for dtype in ("bf16", "fp32")
        for size in (1024, 4096)
        for M in (8, 16, 32, 64, 96, 128)
    ),
    Case(INVARIANT, "cpu", "bf16", {"M": 32, **_WIDE}),
    Case(INVARIANT, "cpu", "bf16", {"M": 512, **_WIDE}),
    Case(INVARIANT, "cpu", "fp32", {"M": 512, **_WIDE}),
    Case(ADD, "cpu", "bf16", {"M": 1, **_WIDE}, quick=True),
    Case(ADD, "cpu", "bf16", {"M": 1, **_make_square(4096)}),
    Case(ADD, "cpu", "fp32", {"M": 4, **_make_square(4096)}),
    Case(ADD, "cpu", "bf16", {"M": 16, **_make_square(4096)}),
    Case(ADD, "cpu", "bf16", {"M": 512, **_WIDE}, lora_dtype="fp32"),
    Case(ADD, "cpu", "fp32", {"M": 512, **_NARROW}),
    Case(MERGE, "cpu", "fp32", _WIDE),
    Case(MERGE, "cpu", "bf16", _WIDE),
    Case(MERGE, "cpu", "bf16", _WIDE, lora_dtype="fp32"),
    Case(MERGE_UNMERGE, "cpu", "bf16", _WIDE, quick=True),
    Case(SWAP, "cpu", "bf16", _WIDE),
    Case(MODEL, "cpu", "bf16", {"B": 2, "L": 64, **_SMALL}, lora_dtype="fp32", dropout=0.05),
    *(
        # The demo's own steps: a third of a second each.
        Case(MODEL, "cpu", dtype, {"B": 8, "L": 128, **_DEMO}, lora, dropout, full=True)
        for dtype, lora in (("fp32", ""), ("bf16", "fp32"))
        for dropout in (0.0, 0.05)
    ),
    # Compilation takes a minute.
    Case(MODEL, "cpu", "fp32", {"B": 2, "L": 64, **_SMALL, "layers": 1}, full=True, compiled=True),
    Case(GENERATE_ONE, "cpu", "fp32", {**_WRITTEN, **_SMALL, "S": 1}),
    Case(GENERATE, "cpu", "fp32", {**_WRITTEN, **_SMALL, "S": 8}, quick=True),
    Case(GENERATE, "cpu", "bf16", {**_WRITTEN, **_DEMO, "S": 8}, full=True),
    *_list_overhead("cpu", "fp32"),
)


def _make_layer(R: int, K: int = 4096, N: int = 4096) -> dict[str, int]:
    return {"K": K, "N": N, "R": R}


def _list_single(work: Linear, dropout: float) -> list[Case]:
    """Lists one adapter at every width of a decoder layer; most of the rarer ones with --full."""
    return [
        Case(
            work,
            "cuda",
            "bf16",
            {"M": M, **_make_layer(R, K, N)},
            dropout=dropout,
            quick=not dropout and M in (1, 8192) and R == 16 and K == N,
            full=(K != N and (R != 16 or M in (1, 64))) or (dropout > 0 and (K != N or M < 2048)),
            compiled=not dropout and M in (1, 256, 8192) and R == 16 and K == N,
        )
        for K, N in ((4096, 4096), (4096, 14336), (14336, 4096))
        for M in (8192, 2048, 256, 64, 16, 1)
        for R in (16, 64)
    ]


def _list_many() -> list[Case]:
    """Lists rows by adapters present by ranks: one layer's width in full, the other in part."""
    cases = []
    for K, N in ((4096, 4096), (4096, 14336)):
        for R, ranks in ((16, ""), (64, ""), (128, "mixed")):
            for T in (32, 256, 1, 2048, 8, 128, 64):
                for S in (8, 32, 128, 1):
                    if S > T:
                        continue
                    decoded = R == 64 and T <= 64 and S <= 32
                    # So many rows are prefilled, a sequence for each adapter, eight at least.
                    B = max(8, S)
                    rows = {"B": B, "L": T // B} if T == 2048 else {"T": T}
                    case = Case(
                        PREFILL if T == 2048 else DECODE,
                        "cuda",
                        "bf16",
                        {**rows, **_make_layer(R, K, N), "S": S},
                        workload="distinct",
                        ranks=ranks,
                        quick=(T, S, R, N) == (32, 8, 16, 4096),
                        full=(K != N or not (R == 16 or decoded))
                        and (T, S) not in ((32, 32), (256, 8), (1, 1)),
                        compiled=(T, S, R, N) == (256, 8, 16, 4096),
                    )
                    cases.append(case)
    return cases


_CUDA = (
    *_list_single(FORWARD, 0.0),
    *_list_single(TRAIN, 0.0),
    *_list_single(TRAIN, 0.1),
    *_list_single(FORWARD, 0.1),
    Case(TRAIN, "cuda", "bf16", {"M": 8192, **_make_layer(16)}, lora_dtype="fp32"),
    *_list_many(),
    Case(PREFILL, "cuda", "bf16", {"B": 4, "L": 512, **_make_layer(16), "S": 8}, workload="zipf"),
    Case(DECODE, "cuda", "bf16", {"T": 256, **_make_layer(16), "S": 128}, workload="zipf"),
    Case(DECODE, "cuda", "bf16", {"T": 256, **_make_layer(16), "S": 8}, workload="skewed"),
    *(Case(INVARIANT, "cuda", "bf16", {"M": M, **_make_layer(16)}) for M in (1, 64, 2048)),
    *(Case(ADD, "cuda", "bf16", {"M": M, **_make_layer(16)}) for M in (1, 16, 256, 2048)),
    Case(MIXED, "cuda", "bf16", {"T": 1024, **_make_layer(16), "S": 8}, workload="zipf"),
    Case(MERGE, "cuda", "bf16", _make_layer(16), quick=True),
    Case(MERGE, "cuda", "bf16", _make_layer(64)),
    Case(MERGE, "cuda", "bf16", _make_layer(16), lora_dtype="fp32"),
    Case(MERGE_UNMERGE, "cuda", "bf16", _make_layer(16), quick=True),
    Case(SWAP, "cuda", "bf16", _make_layer(16)),
    Case(MODEL, "cuda", "bf16", {"B": 4, "L": 512, **_BLOCK}, lora_dtype="fp32", quick=True),
    Case(MODEL, "cuda", "bf16", {"B": 4, "L": 512, **_BLOCK}, lora_dtype="fp32", dropout=0.05),
    Case(MODEL, "cuda", "bf16", {"B": 8, "L": 512, **_BLOCK}, lora_dtype="fp32", compiled=True),
    *(
        Case(
            GENERATE_ONE if S == 1 else GENERATE,
            "cuda",
            "bf16",
            {"B": 32, "L": 128, "new": 16, **_BLOCK, "layers": 2, "S": S},
            quick=S == 8,
        )
        for S in (8, 1, 32)
    ),
    *_list_overhead("cuda", "bf16"),
)
# Something of every suite before the rest of any: the run may be cut short.
CUDA = tuple(sorted(_CUDA, key=lambda case: not case.quick))


def select(
    device: str,
    *,
    suite: str | None = None,
    name: str = "*",
    quick: bool = False,
    full: bool = True,
) -> list[Case]:
    """Selects the device's cases of a suite whose name matches the glob pattern, in order."""
    return [
        case
        for case in (CUDA if device == "cuda" else CPU)
        if suite in (None, case.suite)
        and fnmatchcase(case.name, name)
        and (case.quick or not quick)
        and (full or not case.full)
    ]


def make_custom(
    device: str, suite: str, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]
) -> list[Case]:
    """Makes cases at shapes (M, K, N, R), for ``multi`` also with S adapters: 8, or one a row.

    Raises ValueError for a suite whose cases are not layers.
    """
    if suite not in ("linear", "multi", "merge"):
        raise ValueError(f"--shapes: expected suite linear, multi or merge, got {suite!r}")
    cases = []
    for M, K, N, R, *S in shapes:
        if S and suite != "multi":
            raise ValueError(f"--shapes: expected M,K,N,R for suite {suite}, got a fifth number")
        layer = {"K": K, "N": N, "R": R}
        for dtype in dtypes:
            case = partial(Case, device=device, dtype=dtype)
            if suite == "linear":
                cases += [case(work, shape={"M": M, **layer}) for work in (FORWARD, TRAIN)]
            elif suite == "multi":
                shape = {"T": M, **layer, "S": S[0] if S else min(8, M)}
                cases.append(case(DECODE, shape=shape, workload="distinct"))
            else:
                cases += [case(work, shape=layer) for work in (MERGE, MERGE_UNMERGE, SWAP)]
    return list({case.name: case for case in cases}.values())
