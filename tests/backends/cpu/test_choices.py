"""Which form a CPU call takes: the row that was measured nearest, or a default that is safe."""

from __future__ import annotations

import json

import pytest
import torch

from fastlora import functional as F
from fastlora.backends import native
from fastlora.backends.cpu import choices, linear
from fastlora.backends.cpu.choices import Choice
from fastlora.kernels.choose import records

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(choices, "cpu_name", lambda: "A CPU")
    (tmp_path / "own").mkdir()
    (tmp_path / "shipped").mkdir()
    choices.forget()
    yield tmp_path
    choices.forget()


def write(folder, **columns) -> None:
    row = {
        "op": "lora_linear", "dtype": "fp32", "isa": native.instruction_set(), "cpu": "A CPU",
        "threads": 1, "abi": native.ABI_VERSION, "rows": 7, "native": False, **columns,
    }  # fmt: skip
    file = folder / choices.FILE
    rows = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*rows, row]))
    choices.forget()


def choose(dtype=torch.float32, op="lora_linear") -> Choice:
    return choices.choose(op, dtype)


def test_choose_takes_default_without_rows(instruction_set):
    for dtype, name in choices.DTYPES.items():
        assert choose(dtype) == (choices.DEFAULTS[instruction_set][name], False)


def test_defaults_name_every_instruction_set_and_dtype(instruction_set):
    assert set(choices.DEFAULTS[instruction_set]) == set(choices.DTYPES.values())


def test_choose_prefers_own_rows_and_near_threads(cache):
    write(cache / "shipped", rows=5, native=True)
    assert choose() == (5, True)
    write(cache / "shipped", rows=6, threads=8)
    assert choose() == (5, True)
    write(cache / "own", rows=9)
    assert choose() == (9, False)
    # Of other ops, dtypes and kernels they say nothing.
    assert choose(op="multi_lora_linear") == (choices.DEFAULTS[native.instruction_set()]["fp32"], 0)


@pytest.mark.parametrize(
    "columns", [{"cpu": "Another"}, {"isa": "mmx"}, {"abi": 0}, {"rows": "many"}, {"threads": None}]
)
def test_choose_passes_over_rows_of_other_machines_and_damaged_ones(columns, cache):
    write(cache / "own", **columns)
    assert choose() == (choices.DEFAULTS[native.instruction_set()]["fp32"], False)


def test_choose_keeps_what_it_has_read_first(cache):
    before = choose()
    (cache / "own" / choices.FILE).write_text("[]")
    assert choose() is before


@pytest.mark.parametrize("dtype", list(choices.DTYPES))
@pytest.mark.parametrize("form", [Choice(0), Choice(99), Choice(0, native=True)])
def test_every_form_gives_the_same_numbers(form, dtype, monkeypatch):
    x, W, A, B, bias = (
        torch.randn(shape).to(dtype) for shape in ((9, 40), (33, 40), (5, 40), (33, 5), (33,))
    )
    want = x.double() @ W.double().T + bias.double()
    want += 0.5 * (x.double() @ A.double().T) @ B.double().T
    calls = []
    native_call = linear.run_linear
    monkeypatch.setattr(
        linear, "run_linear", lambda *args: calls.append(args[3]) or native_call(*args)
    )
    monkeypatch.setattr(choices, "forced", form)
    got = F.lora_linear(x, W, A, B, 0.5, bias=bias)
    assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()
    # With the weight in the one call, or in one of its own, or in torch's product.
    with_weight = [weight is not None for weight in calls]
    assert with_weight == {0: [True, False] if form.native else [False], 99: [True]}[form.rows]
