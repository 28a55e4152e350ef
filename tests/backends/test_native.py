"""The native library: what binds it, what refuses it, and that its bits depend on nothing else."""

import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastlora import functional as F
from fastlora.backends import dropout, native
from fastlora.backends.cpu import linear as cpu_linear
from fastlora.backends.cpu import multi as cpu_multi
from fastlora.backends.cuda import linear as cuda_linear
from fastlora.backends.cuda import merge as cuda_merge
from fastlora.backends.values import Adapters, Rows
from fastlora.ops import dispatch
from tests.support import forks
from tests.support.calls import weight_and_adapter
from tests.support.helpers import (
    assert_accurate,
    contiguous,
    same_bits,
    signed,
    strided,
    transposed,
)

HEADER = Path(__file__).parents[2] / "csrc" / "fastlora.h"
CPU = torch.device("cpu")

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)

SETS = native.available().split(", ")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def functions_of_header() -> dict[str, tuple[str, list[str]]]:
    """Of every function in the header: result and arguments, as ctypes has them."""
    kinds = {
        "int32_t": "c_int",
        "int64_t": "c_long",
        "float": "c_float",
        "void": "None",
        "const char*": "c_char_p",
    }

    def kind(text: str) -> str:
        text = re.sub(r"\w+$", "", text.strip()).strip() if text.strip() != "void" else text
        if text == "const char*":
            return kinds[text]
        return "c_void_p" if "*" in text else kinds[text]

    text = re.sub(r"/\*.*?\*/|^#.*?$", "", HEADER.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = {}
    for result, name, arguments in re.findall(
        r"FASTLORA_API ([^;(]*?)(\w+)\((.*?)\);", text, re.DOTALL
    ):
        parts = [] if arguments.strip() == "void" else arguments.replace("\n", " ").split(",")
        kept = kinds.get(result.strip(), "c_void_p")
        found[name] = (kept, [kind(part) for part in parts])
    return found


def test_function_table_matches_the_c_header():
    bound = {
        name: (getattr(result, "__name__", "None"), [a.__name__ for a in arguments])
        for name, (result, arguments) in native.FUNCTIONS.items()
    }
    assert bound == functions_of_header()
    assert len(bound) == 24


def test_codes_and_version_match_the_c_header():
    text = HEADER.read_text()
    numbers = dict(re.findall(r"#define FASTLORA_(\w+) (\d+)", text))
    assert int(numbers.pop("ABI_VERSION")) == native.ABI_VERSION
    types = {str(dtype).removeprefix("torch.").upper(): n for dtype, n in native.DTYPES.items()}
    assert {name: int(numbers.pop(name)) for name in types} == types
    paths = {name: int(numbers.pop(name)) for name in list(numbers) if name in vars(cuda_linear)}
    assert paths == {name: getattr(cuda_linear, name) for name in paths}
    assert len(paths) == 4
    how = ("UNDO", "MERGE", "KEEP", "SUMS", "POOLED", "ALIGNED")
    flags = {name: int(numbers.pop(name)) for name in how}
    assert flags == {name: getattr(cuda_merge, f"_{name}") for name in how}
    assert {name: getattr(native, name) for name in numbers} == {
        name: int(number) for name, number in numbers.items()
    }


def compile_library(tmp_path: Path, source: str) -> Path:
    file, library = tmp_path / "other.c", tmp_path / "libother.so"
    file.write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", str(file), "-o", str(library)], check=True)
    return library


@pytest.mark.parametrize(
    "source, reason",
    [
        ("int fastlora_abi_version(void) { return 99; }", "was built for ABI version 99"),
        (f"int fastlora_abi_version(void) {{ return {native.ABI_VERSION}; }}", "undefined symbol"),
        ("int other(void) { return 1; }", "undefined symbol: fastlora_abi_version"),
    ],
)
def test_load_refuses_library_of_another_version(source, reason, tmp_path):
    assert reason in native.load(compile_library(tmp_path, source))


def test_load_refuses_file_that_is_no_library(tmp_path):
    broken = tmp_path / "libbroken.so"
    broken.write_text("no library")
    assert "cannot be loaded" in native.load(broken)
    assert "was not built" in native.load(tmp_path / "missing.so")


PROBE = """
import fastlora, torch
from fastlora.backends import native
print(fastlora.backend(), native.unusable() or native.instruction_set())
x, W, A, B = (torch.randn(3, 3) for _ in range(4))
y = fastlora.functional.lora_linear(x, W, A, B, 0.5)
assert torch.allclose(y, x @ W.T + 0.5 * x @ A.T @ B.T, atol=1e-5)
"""


@pytest.mark.parametrize("name", [*SETS, "none", "mmx"])
def test_environment_variable_forces_an_instruction_set(name):
    """Or none: then, and where the name is wrong, plain torch runs and `unusable` says why."""
    env = {**os.environ, "FASTLORA_CPU_ISA": name, "FASTLORA_BACKEND": ""}
    run = forks.run(PROBE, env=env)
    said = {
        "none": "torch FASTLORA_CPU_ISA=none switches the native library off",
        "mmx": f"torch FASTLORA_CPU_ISA: expected none or one of {native.available()}, got 'mmx'",
    }
    assert run.stdout.strip() == said.get(name, f"cpu {name}"), run.stderr
    assert ("RuntimeWarning: FASTLORA_CPU_ISA" in run.stderr) == (name == "mmx")


def multi_operands(T, K, N, R, S, dtype, lora_dtype):
    x, weight = signed(T, K, dtype=dtype, device=CPU), signed(N, K, dtype=dtype, device=CPU)
    A = signed(S, R, K, dtype=lora_dtype, device=CPU)
    B = signed(S, N, R, dtype=lora_dtype, device=CPU, size=max(R, 1) ** -0.5)
    return x, weight, A, B, torch.randn(S)


@pytest.mark.parametrize("R", [3, 8, 16, 32, 64, 200])
@pytest.mark.parametrize("lora", ["same", "fp32"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_multi_linear_is_right_on_every_instruction_set(dtype, lora, R, instruction_set):
    """Whole vectors, rests of every kind, one row, a few, more than a block."""
    lora_dtype = torch.float32 if lora == "fp32" else dtype
    for T, K, N in ((1, 64, 64), (5, 67, 83), (70, 33, 17)):
        x, weight, A, B, scalings = multi_operands(T, K, N, R, 3, dtype, lora_dtype)
        ids = torch.randint(-1, 3, (T,))
        slots = ids.clamp(min=0)
        factor = torch.where(ids < 0, 0.0, scalings[slots])
        h = torch.einsum("tk,trk->tr", x.double(), A.double()[slots])
        delta = torch.einsum("tr,tnr->tn", h, B.double()[slots]) * factor[:, None]
        want = x.double() @ weight.double().T + delta
        with dispatch.use_backend("torch"):
            unfused = F.multi_lora_linear(x, weight, A, B, ids, scalings)
        got = F.multi_lora_linear(x, weight, A, B, ids, scalings)
        assert_accurate(got, want, unfused, dtype, tokens=T)
        y = x.new_empty(T, N)
        groups, nothing = F.group_rows(ids, 3), x.new_empty(T, R)
        slots_of_rows = Rows(*groups.tensors, scalings, None, None)
        cpu_multi.run_multi(y, nothing, x, weight, None, Adapters(A, B), slots_of_rows)
        assert_accurate(y, want, unfused, dtype, tokens=T)


# The last is large enough for lanes that equal the threshold, one of 65536.
@pytest.mark.parametrize("M, K", [(1, 1), (3, 7), (5, 128), (4, 431), (0, 5), (2, 0), (300, 2200)])
@pytest.mark.parametrize("lay", [contiguous, strided, transposed])
@pytest.mark.parametrize("dtype", FLOATS)
def test_native_dropout_has_mask_of_every_backend(M, K, dtype, lay, instruction_set):
    seed, p, first_row = dropout.new_seed(CPU), 0.3, 9
    x = lay(signed(M, K, dtype=dtype, device=CPU))
    want = dropout.dropped(x, p, seed, first_row)
    drop = cpu_linear.Dropout(p, seed)
    # Minus zero and zero are the same to whom it matters here.
    assert torch.equal(drop(x, first_row), want)
    assert torch.equal(
        drop(x, first_row, scaled=False), x * dropout.keep_mask(M, K, p, seed, first_row)
    )
    y = signed(M, K, dtype=dtype, device=CPU)
    summed = y.clone()
    drop.add_(summed, x, first_row)
    scale = dropout.keep_scale(p)
    mask = dropout.keep_mask(M, K, p, seed, first_row)
    torch.testing.assert_close(summed, (y.double() + scale * x.double() * mask).to(dtype))


@pytest.mark.parametrize(
    "M, R, C", [(1, 1, 1), (7, 3, 65), (131, 16, 300), (64, 40, 32), (0, 2, 5)]
)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_is_right_on_every_instruction_set(M, R, C, dtype, transposed, instruction_set):
    left, right = signed(M, R, dtype=dtype, device=CPU), signed(M, C, dtype=dtype, device=CPU)
    # Behind an odd last row, which a step of two could take in.
    right = torch.cat([right, right.new_full((1, C), torch.nan)])[:M]
    like = torch.empty(0, dtype=torch.float32)
    got = cpu_linear.gradient(left, right, like, 0.5, transposed=transposed)
    want = 0.5 * left.double().T @ right.double()
    error = (got.double() - (want.T if transposed else want)).norm()
    # Products of halves are exact in float32, sums are not.
    assert error <= 1e-5 * (want.norm() + 1e-30)


@pytest.mark.parametrize("dtype", FLOATS)
def test_native_bits_do_not_depend_on_threads(dtype, instruction_set):
    operands = multi_operands(70, 130, 300, 16, 5, dtype, torch.float32)
    weight, adapter = weight_and_adapter(300, 431, 16, dtype)
    ids, results = torch.arange(70) % 6 - 1, []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            x, W, A, B, scalings = operands
            t = [t.clone().requires_grad_() for t in (x, W, A[0], B[0])]
            y = F.lora_linear(*t, 0.5)
            y.backward(torch.ones_like(y))
            merged = weight.clone()
            receipt = F.merge_(merged, [adapter])
            h = x.new_empty(70, 16)
            added = F.multi_lora_add_(x.new_zeros(70, 300), x, A, B, ids, scalings)
            few = x.new_empty(70, 300)
            cpu_linear.run_linear(few, h, x, W, None, A[0], B[0], None, 0.5)
        finally:
            torch.set_num_threads(1)
        parts = (receipt.positions, receipt.bits, receipt.checksums)
        results.append((few, added, h, t[2].grad, t[3].grad, merged, *parts))
    for one, other in pairwise(results):
        assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", FLOATS)
def test_row_delta_has_same_bits_in_any_batch(dtype, lora_dtype, instruction_set):
    """Alone, among its adapter's rows, among others', in whatever order; natively whole too."""
    T, K, N, R, S = 39, 67, 83, 16, 4
    x, W, A, B, scalings = multi_operands(T, K, N, R, S, dtype, lora_dtype or dtype)
    ids, base = torch.arange(T) // 9 - 1, signed(T, N, dtype=dtype, device=CPU)
    y = F.multi_lora_add_(base.clone(), x, A, B, ids, scalings)

    def native_linear(rows):
        groups, (out, h) = F.group_rows(ids[rows], S), (x.new_empty(len(rows), n) for n in (N, R))
        slots_of_rows = Rows(*groups.tensors, scalings, None, None)
        cpu_multi.run_multi(out, h, x[rows], W, None, Adapters(A, B), slots_of_rows)
        return out

    one = F.lora_add_(base.clone(), x, A[0], B[0], 0.5)
    whole = native_linear(torch.arange(T))
    for rows in (*torch.arange(T).split(1), torch.randperm(T), torch.arange(3, 30, 5)):
        part = F.multi_lora_add_(base[rows].clone(), x[rows], A, B, ids[rows], scalings)
        assert same_bits(part, y[rows])
        assert same_bits(native_linear(rows), whole[rows])
        assert same_bits(F.lora_add_(base[rows].clone(), x[rows], A[0], B[0], 0.5), one[rows])
