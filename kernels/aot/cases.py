"""What ``aot`` compiles: kernels, dtypes, targets, configs, and the forms of a call."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastlora.kernels.choose import choice
from fastlora.kernels.choose.ledger import Problem
from fastlora.kernels.tile import configs, fitting
from fastlora.kernels.tile.configs import Config

# Ampere, Hopper and Blackwell of data centres, and what consumers have of Ada and Blackwell.
ARCHS, CONSUMER = (80, 90, 100), (89, 120)
KERNELS = (*configs.CANDIDATES, "merge", "gather", "keep_mask")
# As rows of kernels/tuning name them, with what x and the adapters are.
DTYPES = {
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "tf32": (torch.float32, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
M, N, K = 4096, 4096, 4096
ODD_M, ODD_N, ODD_K, ODD_R = 1001, 1127, 1129, 13


@dataclass(frozen=True)
class Variant:
    """What a call may ask for beside its shapes, and those where they change the code."""

    rank: int = 16
    backward: bool = False  # the layouts of backward for x: w = weight
    biases: bool = False
    drops: str = ""  # "x" or "y": where dropout is
    first: bool = False
    overlap: bool = False
    odd: bool = False  # of no alignment
    few: bool = False  # one row, or too few to split
    one: bool = False  # of one row, column and rank, which triton takes for constants
    no_weight: bool = False
    # Of many adapters: in pages, of a packed projection, with h in parts.
    paged: bool = False
    packed: bool = False
    split: bool = False
    # Of a merge: whether a receipt's adapters are taken out, and others put in ("kept", with a
    # receipt, or "for good").
    takes: bool = False
    puts: str = ""

    def __str__(self) -> str:
        flags = [name for name, value in vars(self).items() if value is True]
        drops = [f"drops_{self.drops}"] if self.drops else []
        puts = [f"puts {self.puts}"] if self.puts else []
        return "+".join([f"R{self.rank}", *flags, *drops, *puts])


@dataclass(frozen=True)
class Case:
    kernel: str
    dtype: str
    config: Config | None
    arch: int
    variant: Variant


def cases(arch: int, kernel: str, sample: bool) -> Iterator[Case]:
    """Every config in its main forms, the defaults in every form there is."""
    # Of float16, whose products take their adapters' steps first, one target is a sample.
    some = ("fp16", "bf16+fp32") if arch == 90 else ("bf16+fp32",)
    dtypes = some if sample else tuple(DTYPES)
    if kernel == "keep_mask":
        yield Case(kernel, "fp32", None, arch, Variant())
        return
    if kernel == "gather":
        yield from (Case(kernel, dtype, None, arch, Variant()) for dtype in ("fp16", "fp32"))
        return
    if kernel == "merge":
        # Its products of float32 are not what torch's setting says.
        merging = importlib.import_module("fastlora.kernels.aot.merge").forms(sample)
        plain = [dtype for dtype in dtypes if dtype != "tf32"]
        yield from (Case(kernel, dtype, None, arch, form) for dtype in plain for form in merging)
        return
    for dtype in dtypes:
        if (kernel, dtype) == ("multi_gemm_tma", "fp32"):
            continue  # never launched
        size, lora_size = (t.itemsize for t in DTYPES[dtype])
        # A decoding step's and a training batch's.
        defaults = dict.fromkeys(configs.default(kernel, m, N, arch) for m in (16, M))
        shipped = () if sample else configs.CANDIDATES[kernel]
        every, main = _forms_of(kernel, arch, sample)
        forms = [(config, form) for config in defaults for form in every]
        forms += [(config, form) for config in shipped for form in main(config)]
        chosen = []
        for config, form in forms:
            if dtype == "fp16" and kernel.removeprefix("multi_").startswith("gemm"):
                if form.overlap:
                    continue
                form = replace(form, first=True)  # as products of float16 always are
            rows = config.BM if kernel == "one_pass" else M
            asked = Problem(rows, K, N, form.rank, size, not form.no_weight, lora_size, form.drops)
            if kernel == "one_pass" and not choice.possible(kernel, asked, arch, False):
                continue
            fitted = fitting.fitted(config, choice.need(kernel, asked, dtype, arch))
            chosen.append(Case(kernel, dtype, fitted, arch, form))
        yield from dict.fromkeys(chosen)


def _forms_of(kernel: str, arch: int, sample: bool):
    """Every form of a call, and a function of a config for the main ones."""
    if kernel.startswith("multi_"):
        many = importlib.import_module("fastlora.kernels.aot.multi")
        return many.forms(kernel, arch, sample), lambda config: many.main_forms()
    return _forms(kernel, arch, sample), partial(_main_forms, kernel)


def _main_forms(kernel: str, config: Config) -> tuple[Variant, ...]:
    ranks = (16, 64, 128) if kernel == "one_pass" and config.BM == 128 else (16, 64)
    forward = tuple(Variant(rank, biases=True) for rank in ranks)
    masked = {"one_pass": "xy", "gemm": "y", "gemm_tma": "y", "expand": "y"}.get(kernel, "x")
    dropped = (
        Variant(64, drops=drops, backward=drops == "y", first=drops == "y") for drops in masked
    )
    return *forward, *dropped


def _forms(kernel: str, arch: int, sample: bool) -> tuple[Variant, ...]:
    plain = Variant(biases=True)
    masked = {
        "one_pass": (replace(plain, drops="x"), Variant(drops="y", backward=True)),
        "gemm": (Variant(drops="y", backward=True, first=True),),
        "expand": (Variant(drops="y", backward=True),),
    }.get(kernel.removesuffix("_tma"), (Variant(drops="x"),))
    if sample:
        return plain, masked[0]
    forms = [Variant(), plain, Variant(backward=True), *masked, replace(plain, rank=512)]
    if kernel == "one_pass":
        forms[-1] = replace(plain, rank=64)
        forms += [Variant(few=True), Variant(no_weight=True), Variant(no_weight=True, drops="x")]
    if kernel.startswith(("gemm", "shrink")):
        forms += [replace(plain, first=True)]
        forms += [Variant(overlap=True), Variant(64, overlap=True)] if arch >= 90 else []
    if kernel == "expand":
        forms += [Variant(no_weight=True), Variant(no_weight=True, drops="y")]
    forms += [Variant(few=True)] if kernel == "gradient" else []
    if kernel != "gemm_tma":
        forms += [Variant(odd=True), Variant(odd=True, backward=True), Variant(one=True)]
    return tuple(forms)
