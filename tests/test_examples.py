"""The examples run, small, and say what they promise."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_train_adapters(capsys):
    for package in ("peft", "transformers", "tokenizers"):
        pytest.importorskip(package)
    main = runpy.run_path(str(EXAMPLES / "train_adapters.py"))["main"]
    sizes = {"rows": 1, "length": 16, "steps": 4, "pretraining": 2, "hidden": 32, "layers": 1}
    main([*(f"--{name}={size}" for name, size in sizes.items()), "--threads=1"])
    said = capsys.readouterr().out
    assert "4 adapters of rank 8, 1 rows of 16 tokens" in said
    for name in ("calendar", "unicode", "records", "morse", "together", "alone", "peft"):
        assert f"\n{name} " in said


def test_train_adapters_sees_losses_that_drift(monkeypatch):
    for package in ("peft", "transformers", "tokenizers"):
        pytest.importorskip(package)
    scope = runpy.run_path(str(EXAMPLES / "train_adapters.py"))
    monkeypatch.setitem(scope["main"].__globals__, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="drifted apart"):
        scope["main"](["--length=16", "--steps=3", "--pretraining=1", "--hidden=32", "--layers=1"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_mixed(dtype, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    main = runpy.run_path(str(EXAMPLES / "generate_mixed.py"))["main"]
    sizes = {"rows": 5, "adapters": 3, "hidden": 64, "layers": 2, "tokens": 4, "rounds": 1}
    main([*(f"--{name}={size}" for name, size in sizes.items()), "--threads=1", f"--dtype={dtype}"])
    said = capsys.readouterr().out
    assert "5 rows, 3 adapters" in said
    rows = {line.split()[0]: float(line.split()[1]) for line in said.splitlines()[1:]}
    assert rows.keys() == {"base", "peft", "fastlora"}
    assert all(rate > 0 for rate in rows.values())
