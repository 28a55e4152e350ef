"""`fastlora merge` prints progress, returns exit codes, and resumes after being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastlora.commands import main as cli
from fastlora.commands import merge as merge_command
from fastlora.commands.merge import parse_adapter
from fastlora.merge_files import journal, run
from fastlora.merge_files.journal import JOURNAL
from tests.support.checkpoints import CONFIG, contents, edit_json, save_adapter, save_base, tensors
from tests.support.models import llama, quiet

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "fastlora", "merge"]
pytestmark = quiet


@pytest.fixture
def merge(merge_folders, capsys, monkeypatch):
    """Runs the command in the given folder: its exit code and what it printed on either stream."""
    monkeypatch.chdir(merge_folders)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["merge", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_merge_command_prints_progress_and_fidelity(merge, merge_folders, tmp_path):
    report = tmp_path / "report.json"
    code, out, err = merge("base", "adapter", "--out", tmp_path / "out", "--report", report)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("merging ")] == [
        f"merging {n}/12: model-{n:05}-of-00012.safetensors" for n in range(1, 13)
    ]
    assert lines[12] == f"merged 14 layers into {tmp_path / 'out'}, 43456 bytes of weights"
    assert lines[13].split() == ["lowest", "gain", "gain", "error", "changed", "|d|/|W|"]
    rows = [line.split() for line in lines[14:]]
    assert len(rows) == 6
    values = json.loads(report.read_text())
    assert values["skipped"] == values["low"] == []
    gains = {name: found["gain"] for name, found in values["layers"].items()}
    assert len(gains) == 14
    assert [row[0] for row in rows[:5]] == sorted(gains, key=gains.__getitem__)[:5]
    assert rows[5][:3] == ["median", "of", "14"]
    assert contents(tmp_path / "out") == contents(merge_folders / "whole")


def test_merge_command_warns_of_low_fidelity(merge, tmp_path):
    code, out, _ = merge("base", "adapter=0.01", "--out", tmp_path / "out")
    assert code == 0
    assert out.splitlines()[-1].startswith("warning: 14 of 14 layers kept less than 90% of")


def test_merge_command_takes_weights_dtype_and_partial(merge, merge_folders, tmp_path):
    out = tmp_path / "out"
    code, said, _ = merge("base", "adapter=-0.5", "lr=0.1=2", "--out", out, "--dtype", "fp32")
    assert code == 0
    assert {t.dtype for t in tensors(out).values()} == {torch.float32}
    pairs = [(merge_folders / "adapter", -0.5), (merge_folders / "lr=0.1", 2.0)]
    run.merge_folder(merge_folders / "base", pairs, tmp_path / "same", dtype=torch.float32)
    assert contents(out) == contents(tmp_path / "same")
    save_adapter(tmp_path / "deep", llama(num_hidden_layers=3), target_modules=["q_proj"])
    code, _, said = merge("base", tmp_path / "deep", "--out", tmp_path / "deeper")
    assert code == 2
    assert "1 of its 3 layers are not in base: model.layers.2.self_attn.q_proj" in said
    code, said, _ = merge(
        "base", tmp_path / "deep", "--out", tmp_path / "deeper", "--allow-partial"
    )
    assert code == 0
    assert "left out: model.layers.2.self_attn.q_proj of" in said
    assert "merged 2 layers into" in said


@pytest.mark.parametrize(
    "text, folder, weight",
    [
        ("runs/a", "runs/a", 1.0),
        ("runs/a=0.5", "runs/a", 0.5),
        ("runs/a=-1e-2", "runs/a", -0.01),
        ("lr=0.1", "lr", 0.1),
        ("lr=0.1=1", "lr=0.1", 1.0),
        ("lr=0.1/step", "lr=0.1/step", 1.0),
        ("7", "7", 1.0),
    ],
)
def test_parse_adapter_takes_weight_after_last_equals_sign(text, folder, weight):
    assert parse_adapter(text) == (folder, weight)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("nowhere adapter --out x/new", "base: expected a folder with a model, got nowhere"),
        ("base nowhere --out x/new", "adapter: expected a folder, got nowhere"),
        ("base none=0.1 --out x/new", "adapter: expected a folder, got none"),
        ("base adapter=nan --out x/new", "weight: expected a finite number, got nan"),
        (
            "base adapter --out whole",
            "out: expected a new folder or an unfinished merge, whole holds a model",
        ),
        ("base adapter --out base/new", "out: expected a folder outside of base"),
        ("base adapter --out x/new --report y/z", "--report: expected a file in a folder to write"),
        (
            "base adapter --out x/new --report base",
            "--report: expected a file in a folder to write",
        ),
    ],
)
def test_merge_command_refuses_bad_input_in_one_line(merge, merge_folders, arguments, says):
    before = contents(merge_folders)
    code, out, err = merge(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"fastlora merge: {says}")
    assert err.count("\n") == 1
    assert contents(merge_folders) == before
    assert not (merge_folders / "x").exists()


@pytest.mark.parametrize(
    "arguments", ["base adapter", "base --out x", "base a --out x --dtype int8"]
)
def test_merge_command_refuses_bad_arguments(merge_folders, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["merge", *arguments.split()])
    assert stopped.value.code == 2


def test_interrupted_merge_command_exits_130_and_resumes(
    merge, merge_folders, tmp_path, monkeypatch
):
    """Ctrl-C in the seventh file: exit code 130, nothing half, and how to go on."""
    out, layout = tmp_path / "out", run._iterate_chunks

    def interrupted(steps, layout_, *rest):
        if "00007" in layout_.path.name:
            raise KeyboardInterrupt
        return layout(steps, layout_, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(run, "_iterate_chunks", interrupted)
        code, _, err = merge("base", "adapter", "--out", out)
    assert (code, err) == (130, "fastlora merge: interrupted; the same command resumes it\n")
    assert not (out / CONFIG).exists()
    code, said, _ = merge("base", "adapter", "--out", out)
    assert code == 0
    assert "6 files were whole from before" in said
    assert contents(out) == contents(merge_folders / "whole")


def test_merge_command_exits_1_on_full_disk(merge_folders, tmp_path):
    """By a limit of the shell: a real error of a real process, exit code 1, no traceback."""
    command = [
        *COMMAND,
        merge_folders / "base",
        merge_folders / "adapter",
        "--out",
        tmp_path / "out",
    ]
    limited = ["sh", "-c", 'ulimit -f 4; exec "$@"', "sh", *command]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no room to write it (File too large); the same command resumes it" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.partial"))
    assert cli.main(["merge", *map(str, command[len(COMMAND) :])]) == 0
    assert contents(tmp_path / "out") == contents(merge_folders / "whole")


# The command, every sync of which takes a while, as on a slow disk. Once so many files are whole it
# stops, at the first sync from then on or a later one, and says so by a file beside the folder.
SLOW = """
import os, pathlib, sys, time
from fastlora.commands.main import main
sync, out = os.fsync, pathlib.Path(sys.argv[-1])
whole, later = int(sys.argv.pop(1)), int(sys.argv.pop(1))
def slowly(handle):
    global later
    if len(list(out.glob("*.safetensors"))) >= whole:
        later -= 1
        if later < 0:
            out.with_name("stopped").touch()
            time.sleep(600)
    time.sleep(0.02)
    sync(handle)
os.fsync = slowly
sys.exit(main(["merge", *sys.argv[1:]]))
"""


def start_slow_merge(
    merge_folders: Path, out: Path, stops_at: int = 1000, later: int = 0
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(stops_at), str(later)]
    arguments = [*command, merge_folders / "base", merge_folders / "adapter", "--out", out]
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# The third sync after a file is whole is that of the folder, which by then has the note of it.
@pytest.mark.parametrize("files, later", [(1, 0), (8, 0), (8, 2)])
@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
def test_killed_merge_command_resumes_to_same_bytes(merge, merge_folders, tmp_path, files, later):
    """kill -9 once so many files are whole: then the same command, and the same bytes."""
    out = tmp_path / "out"
    with start_slow_merge(merge_folders, out, files, later) as process:
        while process.poll() is None and not (tmp_path / "stopped").exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(list(out.glob("*.safetensors"))) == files
    assert not (out / CONFIG).exists()
    kept = len(json.loads((out / JOURNAL).read_bytes())["finished"])
    assert kept == files - (later == 0)
    code, said, _ = merge("base", "adapter", "--out", out)
    assert code == 0
    assert (f"{kept} files were whole from before" in said) == bool(kept)
    assert contents(out) == contents(merge_folders / "whole")


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX does")
def test_second_merge_command_into_folder_is_refused(merge_folders, tmp_path):
    """One merges, the other is told, whichever comes first."""
    out = tmp_path / "out"
    first, second = (start_slow_merge(merge_folders, out) for _ in range(2))
    said = [process.communicate()[1] for process in (first, second)]
    codes = [first.returncode, second.returncode]
    assert sorted(codes) == [0, 2]
    refused = said[codes.index(2)]
    assert "another process is merging into" in refused or "expected a new folder" in refused
    assert contents(out) == contents(merge_folders / "whole")


def test_merge_command_refuses_quantized_base_without_traceback(merge, merge_folders, tmp_path):
    save_base(tmp_path / "base")
    edit_json(tmp_path / "base" / CONFIG, quantization_config={"quant_method": "gptq"})
    code, _, err = merge(tmp_path / "base", "adapter", "--out", tmp_path / "out")
    assert code == 2
    assert "is quantised (gptq)" in err
    assert not journal.is_unfinished(tmp_path / "out")


def test_merge_summary_gives_large_sizes_in_gigabytes():
    merged = run.Merged({"l": run.Fidelity(1.0, 0.0, 1.0, 0.1)}, [], 14_500_000_000, [])
    first, _, row = merge_command.summarize(merged, Path("out")).splitlines()
    assert first == "merged 1 layers into out, 14.5 GB of weights"
    assert row.split() == ["l", "1.000", "0.0e+00", "100.0%", "1.0e-01"]
