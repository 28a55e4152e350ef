"""`fastlora check` passes right paths, fails wrong ones, and stamps only what passed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastlora.backends import torch as reference
from fastlora.commands import main as cli
from fastlora.commands.check import run as selftest
from fastlora.commands.check import stamps
from fastlora.ops import availability, dispatch
from fastlora.ops.table import OPS
from tests.commands.check.test_stamps import FACTS, ROW, rows
from tests.support import forks

CPU = torch.device("cpu")
LINEAR = [name for name, op in OPS.items() if op.kind == "linear"]
MULTI = [name for name, op in OPS.items() if op.kind in ("multi", "packed")]


class RealStamps(stamps.Stamps):
    """As on a GPU."""

    def __init__(self, device: torch.device, folder: Path | None, quick: bool) -> None:
        super().__init__(device, folder, quick)
        self._real, self._facts = True, dict(FACTS)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    choice = pytest.importorskip("fastlora.kernels.choose.choice")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    choice.forget()
    yield tmp_path
    choice.forget()


def passed_rows(folder):
    return [row for row in rows(folder) if row.get("passed", True)]


@pytest.fixture
def backend(monkeypatch, cache):
    """Reference ops in place of the Triton ones; `spoil(op, path, results)` may change results."""

    def install(spoil=lambda op, path, results: None):
        def implementation(op: str, name: str):
            assert name == "triton"

            def run(*args: object, path: str = selftest.IN_PLACE):
                results = getattr(reference, op)(*args)
                if op in selftest.MERGES:
                    changed = spoil(op, path, list(results or ()))
                    return results if changed is None else changed
                in_place = op.endswith("add_")
                written = list(args[: 1 if "packed" in op else 2]) if in_place else results
                written = [written] if isinstance(written, torch.Tensor) else list(written)
                changed = spoil(op, path, written)
                if in_place:
                    return None
                if op == "packed_lora_linear":
                    return results if changed is None else changed[0]
                return results if changed is None else changed

            return run

        monkeypatch.setattr(dispatch, "implementation", implementation)
        monkeypatch.setattr(selftest, "Stamps", RealStamps)

    return install


def check(names=("bf16",), backends=("triton",), **options) -> tuple[bool, list[str]]:
    said: list[str] = []
    options = {"quick": False, **options}
    passed = selftest.check(CPU, backends, names=names, say=said.append, **options)
    return passed, said


def test_check_passes_torch_on_the_cpu():
    passed, said = check(names=None, backends=["torch"], quick=True)
    assert passed
    table = [line.split() for line in said if line.startswith("torch")]
    assert [line[2] for line in table] == ["fp32", "fp16", "bf16", "fp16+fp32", "bf16+fp32"]
    assert all(line[-1] == "passed" and int(line[3]) >= 15 for line in table)
    assert said[-1] == "all passed"


QUICKENED = """
import runpy
from tests.support import interpreter

interpreter.quicken()
runpy.run_module("fastlora", None, "__main__")
"""


@pytest.mark.full  # every path's own tests are quick; tests above run the command
def test_check_passes_interpreted_triton_kernels(tmp_path):
    """In a process of its own: kernels are interpreted or compiled for good."""
    pytest.importorskip("triton")
    arguments = "check --device cpu --backend triton --dtype bf16+fp32 --quick"
    env = os.environ | {"TRITON_INTERPRET": "1", "FASTLORA_CACHE": str(tmp_path)}
    done = forks.run(QUICKENED, *arguments.split(), env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("triton")]
    assert [(line[1], line[-1]) for line in lines] == [
        ("one_pass", "passed"),
        ("two_pass", "passed"),
        ("library", "passed"),
        ("decode", "passed"),
        ("prefill", "passed"),
        ("added", "passed"),
        ("in_place", "passed"),
    ]
    assert "nothing is stamped" in done.stdout
    assert not rows(tmp_path)


def test_check_of_one_op_uses_same_data(backend, cache):
    seen: dict[str, list] = {}

    def remember(op, path, results):
        seen.setdefault(op, []).extend(t.clone() for t in results if isinstance(t, torch.Tensor))

    backend(remember)
    check(seed=3)
    together = dict(seen)
    for op in ("lora_linear_backward", "packed_lora_linear"):
        seen.clear()
        (cache / "verified.json").unlink()
        passed, _ = check(ops=[op], seed=3)
        assert passed
        assert list(seen) == [op]
        assert {row["op"] for row in rows(cache)} == {op}
        assert len(seen[op]) == len(together[op])
        assert all(map(torch.equal, seen[op], together[op]))


def test_check_stamps_paths_that_pass(backend, cache):
    backend()
    passed, said = check()
    assert passed
    assert f"{len(rows(cache))} rows of verified paths written to {cache}" in said
    found = {(row["op"], row["path"]) for row in rows(cache)}
    both = {(op, path) for op in LINEAR for path in ("one_pass", "two_pass")}
    linear = {"lora_linear", "lora_linear_backward"}
    wide = {(op, "library") for op in linear} | {(op, "overlapped") for op in linear}
    # Under the interpreter nothing overlaps.
    many = ("decode", "decode_beside", "prefill", "prefill_beside", "library")
    products = ("multi_lora_linear", "multi_lora_linear_backward", "packed_lora_linear")
    multi = {(op, path) for op in products for path in many}
    # Without a weight there is one path, of backward too.
    multi |= {(op, "added") for op in MULTI}
    multi |= {(op, "in_place") for op in selftest.MERGES}
    assert both <= found <= both | wide | multi
    assert {path for op, path in found if op == "packed_lora_add_"} == {"added"}
    assert all(row["dtype"] == "bf16" and FACTS.items() <= row.items() for row in rows(cache))


def scaled(op, path, results):
    results[0].mul_(1.1)


def one_nan(op, path, results):
    results[-1].view(-1)[-1] = float("nan")


def unwritten(op, path, results):
    """As an op that leaves its last element as it was allocated."""
    if op.endswith("add_"):
        results[-1][-1:] = torch.empty_like(results[-1][-1:])
        return None
    return [torch.empty_like(results[0]), *results[1:]]


def other_dtype(op, path, results):
    if op.endswith("add_"):
        raise TypeError("an argument that the compiler does not take")
    return [result.double() for result in results]


def raising(op, path, results):
    raise RuntimeError("the kernel does not compile\nat line 3")


def never_the_same(op, path, results):
    results[0].view(-1)[0] += 1e-3 * torch.rand(()).item() + 8e-3 * (torch.rand(()).item() > 0.5)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (scaled, "times what is allowed"),
        (one_nan, "errs by nan"),
        (unwritten, "errs by nan"),
        (other_dtype, "float64"),
        (raising, "the kernel does not compile"),
        (never_the_same, "other bits"),
    ],
)
def test_check_fails_broken_path_without_stamp(backend, cache, wrong, says):
    """The other paths are checked, and stamped, all the same."""

    def spoil(op, path, results):
        return wrong(op, path, results) if path == "two_pass" else None

    backend(spoil)
    broken = [ROW | {"path": "two_pass"}, ROW | {"path": "two_pass", "arch": 80}]
    for row in broken:
        stamps.write(row, None)
    passed, said = check(ops=LINEAR)  # which alone have that path
    assert not passed
    assert said[-1] == "FAILED"
    assert any(says in line for line in said), said
    results = {line.split()[1]: line.split()[-1] for line in said if line.startswith("triton")}
    assert results["two_pass"] == "FAILED"
    assert results["one_pass"] == "passed"
    assert "one_pass" in {row["path"] for row in passed_rows(cache)}
    # What had passed once, and on another architecture still does. That a kernel cannot be had, for
    # lack of memory or a compiler's whim, is not held against it.
    kept = broken if wrong is raising else broken[1:]
    found = [row for row in passed_rows(cache) if row["path"] == "two_pass"]
    assert sorted(found, key=str) == sorted(kept, key=str)
    assert any("of paths that failed" in line for line in said) == (wrong is not raising)


def test_check_fails_only_the_broken_op(backend, cache):
    backend(lambda op, path, results: scaled(op, path, results) if op == "lora_add_" else None)
    passed, said = check()
    assert not passed
    every = {*LINEAR, *MULTI, *selftest.MERGES}
    assert {row["op"] for row in passed_rows(cache)} == every - {"lora_add_"}
    assert all("lora_add_" in line for line in said if line.startswith("    "))


def test_quick_check_writes_no_stamps(backend, cache):
    stamps.write(ROW, None)
    backend(lambda op, path, results: scaled(op, path, results) if path == "one_pass" else None)
    passed, said = check(quick=True)
    assert not passed
    assert rows(cache) == [ROW]
    assert any("nothing is stamped by a quick check" in line for line in said)


def test_check_stops_when_device_is_lost(backend, cache, monkeypatch):
    def spoil(op, path, results):
        if path == "two_pass":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    backend(spoil)
    monkeypatch.setattr(selftest, "is_lost", lambda device: True)
    passed, said = check(names=["bf16", "fp16"])
    assert not passed
    assert "does not recover" in said[-1]
    assert {row["path"] for row in passed_rows(cache)} == {"one_pass"}
    assert not any("fp16" in line for line in said)
    assert sum(line.startswith("    ") for line in said) == 1


def test_check_writes_rows_into_given_folder(backend, cache, tmp_path):
    backend()
    folder = tmp_path / "tuning"
    assert check(folder=folder, ops=["lora_add_"])[0]
    assert rows(folder)
    assert not rows(cache)


def command(arguments: str) -> int:
    return cli.main(["check", *arguments.split()])


@pytest.mark.parametrize("passed", [True, False])
def test_check_command_passes_options_and_exit_code(monkeypatch, tmp_path, passed):
    seen = {}

    def fake(device, backends, **options):
        seen.update(options, device=device, backends=backends)
        return passed

    monkeypatch.setattr(selftest, "check", fake)
    arguments = "--device cpu --backend torch --dtype bf16 --op merge_ --quick --seed 3"
    arguments += f" --save {tmp_path}"
    assert command(arguments) == (0 if passed else 1)
    assert seen == {
        "device": CPU,
        "backends": ["torch"],
        "names": ["bf16"],
        "ops": ["merge_"],
        "quick": True,
        "folder": tmp_path,
        "seed": 3,
    }


def test_check_command_reports_backends_that_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(availability, "_TRITON", False)
    assert command("--device cpu --backend triton --quick") == 2
    assert "triton is not installed" in capsys.readouterr().err
    assert command("--device cpu --dtype bf16 --quick") == 0
    assert "triton was not checked: triton is not installed" in capsys.readouterr().out
    monkeypatch.setattr(availability, "no_gpu", lambda: "no CUDA GPU was found")
    assert command("--device cuda") == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_set_fp32_precision_restores_previous_precision():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for name, expected in {"tf32": "tf32", "fp32": "ieee", "bf16": "ieee"}.items():
        with selftest.set_fp32_precision(name):
            assert matmul.fp32_precision == expected
        assert matmul.fp32_precision == before
