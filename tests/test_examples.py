"""The examples run, small, and say what they promise."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


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
