"""The examples run at small sizes and detect wrong results."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def test_train_adapters_example_runs_small(capsys):
    for package in ("peft", "transformers", "tokenizers"):
        pytest.importorskip(package)
    main = runpy.run_path(str(EXAMPLES / "train_adapters.py"))["main"]
    sizes = {"rows": 1, "length": 16, "steps": 4, "pretraining": 2, "hidden": 32, "layers": 1}
    main([*(f"--{name}={size}" for name, size in sizes.items()), "--threads=1"])
    said = capsys.readouterr().out
    assert "4 adapters of rank 8, 1 rows of 16 tokens" in said
    for name in ("calendar", "unicode", "records", "morse", "together", "alone", "peft"):
        assert f"\n{name} " in said


def test_train_adapters_example_detects_drifting_losses(monkeypatch):
    """By more than rounding does: the adapters together learn at ten times the others' rate."""
    for package in ("peft", "transformers", "tokenizers"):
        pytest.importorskip(package)
    scope = runpy.run_path(str(EXAMPLES / "train_adapters.py"))

    class Faster(scope["Together"]):
        def __init__(self, base, config, names, rate):
            super().__init__(base, config, names, 10 * rate)

    monkeypatch.setitem(scope["main"].__globals__, "Together", Faster)
    with pytest.raises(SystemExit, match="drifted apart"):
        scope["main"](["--length=16", "--steps=3", "--pretraining=1", "--hidden=32", "--layers=1"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_mixed_example_runs_small(dtype, capsys):
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


MANY = [
    "--adapters=12", "--resident=4", "--requests=10", "--rows=4", "--tokens=8", "--hidden=32",
    "--layers=1", "--peft-requests=5", "--threads=1",
]  # fmt: skip


def test_serve_many_adapters_example_runs_small(capsys):
    for package in ("peft", "transformers", "tokenizers"):
        pytest.importorskip(package)
    main = runpy.run_path(str(EXAMPLES / "serve_many_adapters.py"))["main"]
    main(MANY)
    said = capsys.readouterr().out
    assert "12 adapters loaded" in said
    assert "10 requests for " in said
    assert "found their adapter on the device, which has 4" in said
    rows = {line[:12].strip(): line[12:].split() for line in said.splitlines()}
    assert [len(rows[name]) for name in ("fastlora", "base model", "PEFT")] == [7, 7, 4]
    assert all(float(rows[name][0]) > 0 for name in ("fastlora", "base model", "PEFT"))
    assert "PEFT wrote the same tokens for 5 of 5 requests" in said


def test_serve_many_adapters_example_detects_wrong_tokens(monkeypatch):
    for package in ("peft", "transformers", "tokenizers"):
        pytest.importorskip(package)
    scope = runpy.run_path(str(EXAMPLES / "serve_many_adapters.py"))
    real = scope["stream"]

    def wrong(server, requests, rows):
        served = real(server, requests, rows)
        served.tokens[0][-1] ^= 1
        return served

    monkeypatch.setitem(scope["main"].__globals__, "stream", wrong)
    with pytest.raises(SystemExit, match="request 0 got other tokens than its adapter's"):
        scope["main"](MANY)


TRAINER = [
    "--steps=4",
    "--hidden=32",
    "--layers=1",
    "--pretraining=2",
    "--length=16",
    "--threads=1",
]


def test_finetune_trainer_example_runs_small(capsys, tmp_path):
    for package in ("peft", "transformers", "tokenizers", "accelerate"):
        pytest.importorskip(package)
    main = runpy.run_path(str(EXAMPLES / "finetune_trainer.py"))["main"]
    main([*TRAINER, "--recompute", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    assert "7 layers replaced" in said
    assert "stopped after 2 of 4 steps" in said
    assert "PEFT reads the adapter" in said
    without, resumed = (line for line in said.splitlines() if " … " in line)
    assert without.split()[1:6] == resumed.split()[:5]
    assert not list(tmp_path.glob("stopped/*/model*"))


def test_finetune_trainer_example_detects_differing_losses(monkeypatch):
    for package in ("peft", "transformers", "tokenizers", "accelerate"):
        pytest.importorskip(package)
    scope = runpy.run_path(str(EXAMPLES / "finetune_trainer.py"))
    # Resumed with the weights that training began with.
    kind = scope["main"].__globals__["AdapterTrainer"]
    monkeypatch.setattr(kind, "_load_from_checkpoint", lambda *_: None)
    with pytest.raises(SystemExit, match="the resumed run has other losses"):
        scope["main"](TRAINER)


@pytest.mark.full  # tests/distributed/test_distributed.py shards the same way
def test_finetune_fsdp2_example_runs_small(tmp_path):
    for package in ("transformers", "tokenizers"):
        pytest.importorskip(package)
    sizes = {"steps": 2, "hidden": 32, "layers": 1, "length": 16, "rows": 1}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "finetune_fsdp2.py"), f"--out={tmp_path}", "--dtype=bfloat16"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, *(f"--{name}={size}" for name, size in sizes.items())],
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for said in ("step 1: ", "step 2: ", " of 2 processes, ", "loss with it ", "saved "):
        assert said in run.stdout
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
