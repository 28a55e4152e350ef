"""Progress prints lines into a file and draws a bar on a terminal."""

import pytest

from fastlora.commands import progress


def test_progress_prints_lines_without_a_terminal(capsys):
    with progress.Progress("tuning", 2) as bar:
        bar.step("one")
        bar.advance_within(0.5)
        bar.say("[bold]as it is")
        bar.step("two")
    assert capsys.readouterr().out == "tuning 1/2: one\n[bold]as it is\ntuning 2/2: two\n"


def test_progress_draws_bar_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True, raising=False)
    with progress.Progress("tuning", 2) as bar:
        bar.step("one")
        bar.advance_within(0.5)
        assert bar._bar.tasks[0].completed == 0.5
        bar.say("[bold]as it is")
    assert "[bold]as it is" in capsys.readouterr().out
