"""`fastlora tune` on a CPU, with a simulated clock, writes up to how many rows one call wins."""

from __future__ import annotations

import json

import pytest
import torch

from fastlora.backends import native
from fastlora.backends.cpu import choices
from fastlora.commands import main as cli
from fastlora.commands.tune import cpu as tuning

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "QUICK_SIZES", (32,))
    monkeypatch.setattr(tuning, "ROWS", (1, 2, 4, 8, 16))
    choices.forget()
    yield tmp_path
    choices.forget()


def clock_favouring(rows: int, native_beyond: bool):
    """A clock for which one call is the faster form up to so many rows."""

    def clock(call) -> float:
        form, M = choices.forced, call().shape[0]
        if form.rows:
            return 0.5 if rows >= M else 2.0
        return 0.9 if form.native and native_beyond else 1.0

    return clock


@pytest.mark.parametrize("rows, beyond", [(0, False), (1, True), (4, False), (16, True)])
def test_tune_writes_last_rows_that_one_call_wins(rows, beyond, cache):
    clock = clock_favouring(rows, beyond)
    tuning.tune_cpu(["fp32"], [1], None, quick=True, clock=clock, say=lambda _: None)
    for row in json.loads((cache / choices.FILE).read_text()):
        assert (row["rows"], row["native"]) == (rows, beyond)
        assert row["isa"] == native.instruction_set()
        assert row["cpu"] == choices.cpu_name()
    assert choices.choose("lora_linear", torch.float32) == (rows, beyond)
    assert choices.forced is None


def test_tune_refuses_form_of_other_numbers(monkeypatch):
    monkeypatch.setitem(tuning._DIFFERENCE, torch.bfloat16, 0.0)
    with pytest.raises(RuntimeError, match="the native product and torch's differ"):
        tuning.tune_cpu(["bf16"], [1], None, quick=True, say=lambda _: None)
    assert choices.forced is None


def test_tune_command_times_this_cpu(cache, capsys):
    assert cli.main(["tune", "--device", "cpu", "--quick", "--dtype", "bf16"]) == 0
    assert "one call up to" in capsys.readouterr().out
    threads = {row["threads"] for row in json.loads((cache / choices.FILE).read_text())}
    assert threads == {1, torch.get_num_threads()}
    assert cli.main(["tune", "--device", "cpu", "--kernel", "gemm"]) == 2
    assert "--shapes and --kernel are of a GPU's kernels" in capsys.readouterr().err
