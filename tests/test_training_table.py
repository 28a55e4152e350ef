"""The table of a training step is printed, and only of models that agree."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("tokenizers")

from benchmarks import training

SMALL = ["--hidden=64", "--layers=1", "--rows=2", "--length=8", "--rounds=1", "--threads=1"]
SMALL += ["--device=cpu"]


def test_it_is_printed(capsys):
    training.main(SMALL)
    _, *body = capsys.readouterr().out.partition("|---")[2].splitlines()
    assert len(body) == 2 * 2 * 3  # dtypes, dropouts, models
    assert all(line.count(" | ") == 4 for line in body)


def test_a_model_that_is_wrong_is_not_timed(monkeypatch):
    made = training.models

    def spoilt(*args):
        found = made(*args)
        with torch.no_grad():
            training.trained(found["FastLoRALinear"])[1].mul_(1.01)
        return found

    monkeypatch.setattr(training, "models", spoilt)
    with pytest.raises(RuntimeError, match="FastLoRALinear: gradients are"):
        training.main(SMALL)


def test_the_peak_is_what_is_held_at_most():
    def call():
        kept = [torch.empty(1000, 1000) for _ in range(3)]
        del kept[1:]
        kept.append(torch.empty(500, 1000))

    assert 12e6 <= training.peak(call, "cpu") < 12.1e6
