"""Fixtures of the benchmark tests."""

import pytest
import torch

from benchmarks.harness import lines, measurement, runner, timer
from fastlora.commands import main as cli
from tests.benchmarks.small_case import SEEN
from tests.benchmarks.small_runs import SMALL, quick_folder


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench_linear(tmp_path, monkeypatch):
    """``fastlora bench`` on two tiny layers, ceilings given; its exit code and lines."""
    monkeypatch.setattr(runner, "_measure_ceilings", lambda *_: SEEN)

    def run(*more: str) -> tuple[int, list[lines.Line]]:
        code = cli.main(["bench", "linear", *SMALL, "--save", str(tmp_path), *more])
        return code, lines.read_all(quick_folder(tmp_path))

    return run


@pytest.fixture
def few_copies(monkeypatch):
    """Of operands so small there would be 200, which take longer to build than to time."""
    monkeypatch.setattr(timer, "_MOST_COPIES", 10)


@pytest.fixture
def bench_in_process(bench_linear, few_copies, monkeypatch):
    """The same without a process for each case."""

    def run_some(batch, command, file, timeout):
        names = {case.name for case in batch}
        lines.filter_file(file, lambda line: line["case"] not in names)
        for case in batch:
            for line in measurement.measure(case, SEEN, seconds=0.05):
                lines.write(line, file)
        return [(case, runner._read_case(case, file)) for case in batch]

    monkeypatch.setattr(runner, "run_some", run_some)
    return bench_linear
