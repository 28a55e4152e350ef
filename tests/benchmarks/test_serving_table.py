"""The serving tables are printed only for servers that agree with PEFT."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("tokenizers")

from benchmarks.tables import serving

SMALL = ["--hidden=64", "--layers=1", "--rows=8", "--tokens=3", "--rounds=1", "--threads=1"]
SMALL += ["--device=cpu", "--cold-rows=2", "--cold-tokens=12", "--every=4", "--rank=4"]


def test_serving_prints_speed_and_cost_tables(capsys):
    serving.main(SMALL)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    heads = [i for i, line in enumerate(lines) if " | tokens/s | " in line or "an adapter" in line]
    assert len(heads) == 2
    speed, cost = lines[1 : heads[1]], lines[heads[1] + 1 :]
    assert len(speed) == 2 * 2 * 3  # dtypes, numbers of adapters, models
    assert all(line.count(" | ") == 5 for line in speed)
    assert [line.split(" | ")[0] for line in cost] == ["| the host's memory", "| disk"]


def test_serving_does_not_time_a_wrong_server(monkeypatch):
    made = serving.load_peft

    def spoilt(*args):
        model = made(*args)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1.01)
        return model

    monkeypatch.setattr(serving, "load_peft", spoilt)
    with pytest.raises(RuntimeError, match="from PEFT's, at most"):
        serving.main(SMALL)
