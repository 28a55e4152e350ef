"""The targets: bounds for cases, and why each can be met."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness.case import BASE
from benchmarks.suites.linear import PATHS
from benchmarks.suites.multi import PATHS as MULTI_PATHS


@dataclass(frozen=True)
class Target:
    """Bound for every case that matches.

    measure: "ratio" is time over that of ``over``, "limit" that over what the ceilings allow, both
    at most ``bound``; "times" is how much faster than ``over``, "bandwidth" the share of the
    ceiling's, both at least. ours: the best of these providers counts.
    """

    device: str
    work: str
    cases: tuple[str, ...]
    ours: tuple[str, ...]
    bound: float
    because: str
    over: str = BASE
    measure: str = "ratio"

    @property
    def at_least(self) -> bool:
        return self.measure in ("times", "bandwidth")


def _list_cuda() -> tuple[Target, ...]:
    layer = "bf16-M8192-K4096-N4096"
    targets = [
        _make_cuda_target(
            f"forward, M = 8192, r = {R}", f"linear-forward-{layer}-R{R}", ours, bound, why
        )
        for R, ours, bound, why in (
            (16, "Triton", 1.10, "memory and arithmetic allow 1.008"),
            (64, "Triton", 1.10, "memory and arithmetic allow 1.031"),
            (16, "CUDA", 1.03, "the shrink overlaps, the product has a step of K more"),
            (64, "CUDA", 1.06, "the shrink overlaps, the product has four steps of K more"),
        )
    ]
    targets.append(
        Target(
            "cuda", "forward over unfused torch, any shape", ("linear-forward-*",), ("fastlora",),
            1.02, "nobody loses by using it", over="torch",
        )
    )  # fmt: skip
    for ours in ("Triton", "CUDA"):
        targets += [
            _make_cuda_target(
                "forward and backward, M = 8192", f"linear-train-{layer}-R??", ours, 1.08,
                "memory and arithmetic allow about 1.05",
            ),
            _make_cuda_target(
                "decode over the limit, up to 8 adapters", "multi-decode-*-S[1-8]-*", ours, 1.10,
                "a launch more than the product", "limit",
            ),
            _make_cuda_target(
                "decode over the limit, up to 128 adapters", "multi-decode-*-S[13]2*-*", ours,
                1.25, "a launch more, and adapters read in pieces", "limit",
            ),
            _make_cuda_target(
                "merge, of the bandwidth", "merge-bf16-K4096-N4096-R16", ours, 0.85,
                "4 bytes an element, one launch", "bandwidth",
            ),
            _make_cuda_target(
                "merge with receipt and back, of the bandwidth",
                "merge-unmerge-bf16-K4096-N4096-R16", ours, 0.70, "the receipt's bytes too",
                "bandwidth",
            ),
        ]  # fmt: skip
    return tuple(targets)


def _make_cuda_target(
    work: str, cases: str, ours: str, bound: float, because: str, measure: str = "ratio"
) -> Target:
    """Makes a target of one backend, whose best path counts."""
    triton = {"linear": PATHS, "multi": MULTI_PATHS}.get(cases.split("-")[0], ("triton",))
    providers = triton if ours == "Triton" else ("cuda",)
    return Target("cuda", f"{work}, {ours}", (cases,), providers, bound, because, measure=measure)


def _list_cpu() -> tuple[Target, ...]:
    def row(work: str, case: str, bound: float, because: str, over: str = BASE) -> Target:
        return Target("cpu", work, (case,), ("fastlora",), bound, because, over)

    def times(work: str, case: str, bound: float, because: str) -> Target:
        return Target("cpu", work, (case,), ("fastlora",), bound, because, "peft", "times")

    decode = "multi-decode-{}-T32-K{}-N{}-R16-S32-distinct"
    python = "Python is a larger part of a small layer"
    rows = [
        row(f"decode 32 x 32 adapters, {kind}, {size}", decode.format(kind, size, size), bound, why)
        for kind, size, bound, why in (
            ("bf16", 4096, 1.08, "adapters are a quarter of W's bytes, behind its flops"),
            ("bf16", 2048, 1.15, "adapters are half of W's bytes"),
            ("bf16", 1024, 1.20, python),
            ("fp32", 2048, 1.12, "adapters are half of W's bytes"),
        )
    ]
    rows += [
        row("prefill 8 x 128, 16 adapters, bf16, 2048",
            "multi-prefill-bf16-B8-L128-K2048-N2048-R16-S16-uniform", 1.04, "1.6 % more flops"),
        row("M = 1, bf16, 4096", "linear-forward-bf16-M1-K4096-N4096-R16", 0.5,
            "torch's product reads W at a third of the bandwidth"),
        row("M = 4, fp32, 4096", "linear-forward-fp32-M4-K4096-N4096-R16", 0.6,
            "torch's product reads W at a third of the bandwidth"),
        row("M = 16, bf16, 4096", "linear-forward-bf16-M16-K4096-N4096-R16", 0.95,
            "the native product prefetches W"),
    ]  # fmt: skip
    for name, kind, bound, why in (
        ("forward", "forward", 1.06, "the adapters' products at torch's rate"),
        ("forward and backward", "train", 1.08, "three times the adapters' products"),
    ):
        rows += [
            row(f"{name}, M = 512, bf16, fp32 adapters, {size}",
                f"linear-{kind}-bf16-M512-K{size}-N{size}-R16-lora_fp32", bound, why)
            for size in (4096, 2048, 1024)
        ]  # fmt: skip
    rows += [
        row("merge fp32, over W.addmm_", "merge-fp32-K2048-N2048-R16", 1.0,
            "W is read and written once by both", over="torch"),
        times("merge bf16, fp32 adapters, PEFT over ours",
              "merge-bf16-K2048-N2048-R16-lora_fp32", 15,
              "one pass, where PEFT makes temporaries of W's size"),
        times("generate, PEFT over ours", "model-generate-*-S8", 2,
              "PEFT loops over the adapters"),
    ]  # fmt: skip
    return tuple(rows)


TARGETS = (*_list_cuda(), *_list_cpu())
