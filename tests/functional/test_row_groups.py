"""group_rows sorts rows by adapter."""

import pytest
import torch

from fastlora import functional as F


def test_group_rows_sorts_stably_by_slot(device):
    ids = torch.randint(-1, 5, (100,), device=device)
    groups = F.group_rows(ids, 5)
    assert groups.ids.tolist() == ids.tolist()
    assert groups.shape == (100,)
    for slot in range(5):
        rows = groups.order[groups.starts[slot] : groups.starts[slot + 1]]
        assert rows.tolist() == (ids == slot).nonzero().flatten().tolist()
    assert groups.order[: groups.starts[0]].tolist() == (ids == -1).nonzero().flatten().tolist()
    twice = groups.repeat(2)
    assert twice.ids.tolist() == ids.repeat_interleave(2).tolist()
    assert twice.order.tolist() == F.group_rows(twice.ids, 5).order.tolist()
    assert twice.starts.tolist() == F.group_rows(twice.ids, 5).starts.tolist()


def test_id_out_of_range_on_gpu_means_none(device):
    if device.type == "cpu":
        pytest.skip("on the host it is an error")
    assert F.group_rows(torch.tensor([0, 7, -9], device=device), 2).ids.tolist() == [0, -1, -1]
