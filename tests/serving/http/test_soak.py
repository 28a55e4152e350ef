"""Random clients for a few seconds; ``python -m tests.support.serving.soak`` runs for minutes."""

from __future__ import annotations

import pytest

from tests.support.serving import soak


@pytest.mark.full
def test_random_clients_get_their_own_answers_and_leave_nothing(tmp_path):
    done = soak.run(seconds=3, clients=6, leavers=20, seed=1, folder=tmp_path)
    assert done.wrong == []
    assert done.done["completed, 200"] > 5
    assert done.done["left"] >= 20
    assert any(kind.startswith("reloaded") for kind in done.done)
