"""`make gpu` watches its parts, records each as it ends, and resumes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts
from benchmarks.gpu.parts import Part, Run

# Its parts are processes that hang, fail and wait; test_gpu_commands is quick.
pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The command takes them out of its environment; other tests want them back."""
    for name in ("TRITON_INTERPRET", "FASTLORA_BACKEND"):
        monkeypatch.delenv(name, raising=False)


OF = {"gpu": "a GPU", "commit": "c0ffee"}


def script(name: str, code: str, seconds: float = 60.0, **options) -> Part:
    return Part(name, (sys.executable, "-c", code), seconds, **options)


def run(folder: Path, *chosen: Part, **options) -> dict[str, str]:
    """The states of the parts, after a run of them."""
    said: list[str] = []
    states = Run(chosen, folder, OF, say=said.append, **{"cores": 2, **options})()
    print("\n".join(said))
    return {name: line["state"] for name, line in states.items()}


def read_states(folder: Path) -> dict[str, dict]:
    return {line["part"]: line for line in parts.read(folder / "run" / "parts.jsonl")}


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 30.0) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.02)


STARTS_ANOTHER = """
import os, pathlib, signal, subprocess, sys, time
{ignores}
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
far = subprocess.Popen(sleep, start_new_session=True)
near = subprocess.Popen(sleep, env={near})
pathlib.Path({file!r}).write_text(f"{{os.getpid()}} {{far.pid}} {{near.pid}}")
{then}
"""


HANGS = "time.sleep(600)"


DEAF = "signal.signal(signal.SIGINT, signal.SIG_IGN)"


@pytest.mark.full  # waits for processes to hang
@pytest.mark.parametrize("ignores", ["", DEAF], ids=["", "deaf"])
@pytest.mark.parametrize("then", [HANGS, "pass"], ids=["hangs", "ends"])
def test_hanging_part_is_ended_with_its_child_processes(tmp_path, ignores, then):
    file = tmp_path / "pids"
    # In its group one is found that has left the mark behind, while the group's first one is there.
    near = "{}" if then == HANGS else "None"
    code = STARTS_ANOTHER.format(file=str(file), ignores=ignores, near=near, then=then)
    states = run(
        tmp_path,
        script("hangs", code, 2.0, grace=0.0),
        script("other", "print('well')", cores=None),
    )
    assert states == {"hangs": "timeout" if then == HANGS else "ok", "other": "ok"}
    pids = [int(pid) for pid in file.read_text().split()]
    assert len(pids) == 3
    wait_until(lambda: not any(map(is_alive, pids)))
    assert read_states(tmp_path)["hangs"].get("reason") == (
        "killed after 2 s" if then == HANGS else None
    )


def test_failing_part_shows_output_and_stops_no_other(tmp_path, capsys):
    states = run(
        tmp_path,
        script("fails", "import sys; print('so far'); sys.exit('no kernel image')"),
        script("dies", "import os; os.abort()"),
        Part("absent", ("no-such-program",), 60.0),
        script("well", "pass"),
    )
    assert states == {"fails": "failed", "dies": "failed", "absent": "failed", "well": "ok"}
    reasons = {name: line["reason"] for name, line in read_states(tmp_path).items()}
    assert (reasons["fails"], reasons["dies"]) == ("exit code 1", "signal SIGABRT")
    assert reasons["absent"].startswith("no-such-program: ")
    log = (tmp_path / "run" / "fails.log").read_text()
    assert log == "so far\nno kernel image\n"
    assert "    no kernel image\n" in capsys.readouterr().out


def test_run_writes_state_as_each_part_ends(tmp_path):
    file = tmp_path / "run" / "parts.jsonl"
    waits = (
        "import pathlib, sys, time\n"
        f"file = pathlib.Path({str(file)!r})\n"
        "for _ in range(500):\n"
        "    if file.exists() and '\"first\"' in file.read_text(): sys.exit()\n"
        "    time.sleep(0.02)\n"
        "sys.exit('it was not written')"
    )
    first = script("first", "pass")
    assert run(tmp_path, script("second", waits), first) == {"second": "ok", "first": "ok"}


def counting(tmp_path: Path, name: str, then: str = "", **options) -> tuple[Part, Path]:
    """A part, and the file that it writes a character to each time it is run."""
    file = tmp_path / f"{name}.count"
    return script(name, f"open({str(file)!r}, 'a').write('x')\n{then}", **options), file


def test_second_run_skips_parts_that_succeeded(tmp_path):
    well, of_well = counting(tmp_path, "well")
    fails, of_fails = counting(tmp_path, "fails", "raise SystemExit(1)")
    always, of_always = counting(tmp_path, "always", again=True)
    late, of_late = counting(tmp_path, "late", least=1e6)
    for _ in range(2):
        states = run(tmp_path, well, fails, always, late, seconds=100.0)
    assert states == {"well": "ok", "fails": "failed", "always": "ok", "late": "not begun"}
    assert (of_well.read_text(), of_fails.read_text(), of_always.read_text()) == ("x", "xx", "xx")
    assert not of_late.exists()

    # With time it is begun, whatever was ok before.
    assert run(tmp_path, well, late) == {"well": "ok", "late": "ok"}
    assert (of_well.read_text(), of_late.read_text()) == ("x", "x")
    # A damaged line is nobody's.
    file = tmp_path / "run" / "parts.jsonl"
    file.write_text(file.read_text() + '{"part": "we')
    run(tmp_path, well)
    assert of_well.read_text() == "x"

    run(tmp_path, well, again=True)
    assert of_well.read_text() == "xx"
    Run([well], tmp_path, {**OF, "commit": "0ther"}, say=lambda what: None)()
    assert of_well.read_text() == "xxx"


def test_deadline_limits_running_and_new_parts(tmp_path):
    tells = "import sys; print(sys.argv[1])"
    told = Part("told", (sys.executable, "-c", tells, "{deadline}"), 500.0, grace=40.0)
    small = Part("small", (sys.executable, "-c", tells, "{deadline}"), 20.0)
    run(tmp_path, told, small, seconds=100.0)
    assert 50 <= int((tmp_path / "run" / "told.log").read_text()) <= 60
    assert (tmp_path / "run" / "small.log").read_text() == "20\n"

    started = time.monotonic()
    hangs = script("hangs", "import time; time.sleep(600)", 500.0, least=1.0, cores=None)
    states = run(tmp_path, hangs, script("later", "pass", least=1.0, cores=None), seconds=2.0)
    assert states == {"hangs": "timeout", "later": "not begun"}
    assert read_states(tmp_path)["later"]["reason"] == "out of time"
    assert time.monotonic() - started < 20


def test_inapplicable_part_reports_reason_at_its_turn(tmp_path):
    made = tmp_path / "library.so"

    def missing() -> str | None:
        return None if made.exists() else "there is no library"

    makes = script("makes", f"import time; time.sleep(0.5); open({str(made)!r}, 'w')")
    after = script("after", "pass", missing=missing, after=("makes",))
    before = script("before", "pass", missing=missing)
    states = run(tmp_path, before, makes, after)
    assert states == {"before": "not applicable", "makes": "ok", "after": "ok"}
    assert read_states(tmp_path)["before"]["reason"] == "there is no library"
    assert gpu.need_modules("torch", "no_such_module", "nor_this")() == (
        "no_such_module, nor_this not installed"
    )
    assert gpu.need_modules("torch")() is None


# Ends when those it waits for have begun too, if they do within half a minute.
SPAN = """
import pathlib, time
began = time.monotonic()
here = pathlib.Path({file!r}).parent
here.joinpath("{name}.begun").touch()
for other in {awaits!r}:
    while not here.joinpath(other + ".begun").exists() and time.monotonic() - began < 30:
        time.sleep(0.01)
time.sleep(0.2)
open({file!r}, "a").write(f"{name} {{began}} {{time.monotonic()}}\\n")
"""


def test_timed_part_runs_alone_while_others_share_cores(tmp_path):
    file = tmp_path / "spans"
    names = {"a": 1, "b": 1, "c": 1, "alone": None, "wide": 64, "after": 1}
    awaits = {"a": "b", "b": "a"}
    chosen = [
        script(
            name, SPAN.format(file=str(file), name=name, awaits=awaits.get(name, "")), cores=cores
        )
        for name, cores in names.items()
    ]
    assert set(run(tmp_path, *chosen, cores=2).values()) == {"ok"}
    spans = {}
    for line in file.read_text().splitlines():
        name, *ends = line.split()
        spans[name] = tuple(map(float, ends))

    def together(one: str, other: str) -> bool:
        return spans[one][0] < spans[other][1] and spans[other][0] < spans[one][1]

    assert together("a", "b")
    assert not (together("a", "c") and together("b", "c"))
    for name in ("alone", "wide"):
        assert not any(together(name, other) for other in names if other != name)
    assert spans["after"][0] > spans["alone"][1] > spans["c"][1]


def test_document_is_kept_only_when_part_succeeds(tmp_path):
    good = "import sys; print('| a table |'); print('a warning', file=sys.stderr)"
    run(
        tmp_path,
        script("good", good, document=True),
        script("bad", f"{good}\nsys.exit(1)", document=True),
    )
    text = (tmp_path / "good.md").read_text()
    heading, *rest = text.splitlines()
    assert heading.endswith("gpu a GPU, commit c0ffee")
    assert rest == ["", "| a table |"]
    assert (tmp_path / "run" / "good.log").read_text() == "a warning\n"
    assert not (tmp_path / "bad.md").exists()


INTERRUPTED = """
import pathlib, sys
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.parts import Part
python, folder = sys.executable, pathlib.Path({folder!r})
chosen = [
    Part("first", (python, "-c", "pass"), 60.0, cores=None),
    Part("hangs", (python, "-c", {code!r}), 60.0, cores=None),
    Part("last", (python, "-c", "pass"), 60.0, cores=None),
]
sys.exit(gpu.run(chosen, folder, {of!r}, 60.0, again=False))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_ends_parts_and_keeps_results(tmp_path, number):
    file = tmp_path / "pids"
    code = STARTS_ANOTHER.format(file=str(file), ignores="", near="None", then=HANGS)
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.format(folder=str(tmp_path), code=code, of=OF)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
        # A shell's background job ignores it, and so do the job's children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_until(lambda: file.exists() and len(file.read_text().split()) == 3)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    wait_until(lambda: not any(is_alive(int(pid)) for pid in file.read_text().split()))
    states = {name: line["state"] for name, line in read_states(tmp_path).items()}
    assert states == {"first": "ok", "hangs": "interrupted", "last": "not begun"}
    assert "ok: first\ninterrupted: hangs\nnot begun: last\n" in said


def test_gpu_run_returns_exit_code_and_summary(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    sample = {"suite": "linear", "case": "a case", "device": "cuda", "provider": "base"}
    (tmp_path / "linear.jsonl").write_text(parts.json.dumps(sample) + "\n")
    well, fails = script("well", "pass"), script("fails", "raise SystemExit(1)")
    late = script("late", "pass", least=1e6)
    assert gpu.run([well, late], tmp_path, OF, 100.0, again=False) == 0
    said = capfd.readouterr().out
    assert "ok: well\nnot begun: late\n" in said
    assert said.index("not begun: late") < said.index("forward, M = 8192, r = 16, CUDA")
    assert gpu.run([well, fails], tmp_path, OF, 100.0, again=False) == 1
