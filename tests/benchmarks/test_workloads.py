"""The request mixes that tests and benchmarks share."""

import pytest
import torch

from benchmarks.suites.workloads import PHASES, WORKLOADS, count_request_rows, draw_adapter_ids


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("phase", PHASES)
def test_draw_adapter_ids_depends_only_on_arguments(workload, phase):
    def draw(seed=3, **how):
        return draw_adapter_ids(workload, 200, 16, phase=phase, sequences=7, seed=seed, **how)

    ids = draw()
    assert ids.shape == (200,)
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < 16
    assert torch.equal(ids, draw())
    assert any(not torch.equal(ids, draw(seed=seed)) for seed in range(4, 10))
    assert (draw(without=1.0) == -1).all()
    lengths = count_request_rows(phase, 200, 7)
    assert sum(lengths) == 200
    assert all(len(set(request.tolist())) == 1 for request in ids.split(lengths))


def test_draw_adapter_ids_follows_the_named_distribution():
    counts = {w: torch.bincount(draw_adapter_ids(w, 4096, 32), minlength=32) for w in WORKLOADS}
    top = {w: int(count.max()) / 4096 for w, count in counts.items()}
    assert top["identical"] == 1.0
    assert counts["distinct"].unique().tolist() == [128]
    assert top["uniform"] < 0.08 < 0.3 < top["zipf"] < 0.6 < 0.75 < top["skewed"] < 0.9
    with pytest.raises(ValueError, match="expected one of distinct"):
        draw_adapter_ids("random", 1, 1)
    with pytest.raises(ValueError, match="expected one of decode"):
        draw_adapter_ids("zipf", 1, 1, phase="both")
