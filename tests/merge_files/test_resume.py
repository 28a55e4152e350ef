"""A merge stopped at any moment is finished by the same call, to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from fastlora.merge_files import durable, merge_folder, plan
from fastlora.merge_files.journal import JOURNAL, LOCK
from tests.support.checkpoints import CONFIG, INDEX, contents
from tests.support.models import quiet

pytestmark = [
    quiet,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of its own"),
]
FIRST, SECOND = "model-00001-of-00012.safetensors", "model-00002-of-00012.safetensors"


def merge(
    merge_folders: Path, out: Path, *, adapter: str = "adapter", weight: float = 1.0, **options: Any
):
    return merge_folder(merge_folders / "base", [(merge_folders / adapter, weight)], out, **options)


@contextmanager
def count_moments(at: Callable[[int, str], None]) -> Iterator[None]:
    """Calls ``at`` with 0, 1, 2, … and what is next: a sync, rename, removal or merged weight."""
    count = iter(range(1 << 30))

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            at(next(count), function.__name__)
            return function(*args, **kwargs)

        return wrapped

    with (
        mock.patch.object(os, "fsync", before(os.fsync)),
        mock.patch.object(os, "replace", before(os.replace)),
        mock.patch.object(Path, "unlink", before(Path.unlink)),
        mock.patch.object(plan.WeightChange, "apply", before(plan.WeightChange.apply)),
    ):
        yield


def is_killed_at(moment: int, call: Callable[[], Any]) -> bool:
    """Whether a fork that makes the call came to the moment at which it was killed, as by -9."""

    def kill(n: int, _: str) -> None:
        if n == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        code = 1
        try:
            with count_moments(kill):
                call()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_merge_killed_anywhere_resumes_to_same_bytes(merge_folders, tmp_path):
    """At moments spread over the run, some within a file, and as the last ones are put in place."""
    whole = contents(merge_folders / "whole")
    moments: dict[int, str] = {}
    with count_moments(moments.__setitem__):
        merge(merge_folders, tmp_path / "counted")
    last = len(moments)
    assert last > 100
    within = [moment for moment, what in moments.items() if what == "apply"]
    assert len(within) == 14
    for moment in sorted({*range(0, last, 11), *within[::4], *range(last - 8, last)}):
        out = tmp_path / str(moment)
        assert is_killed_at(moment, lambda out=out: merge(merge_folders, out))
        found = contents(out)
        if CONFIG in found:
            assert found | whole == found
        names = {n for n in found if n in whole and n.endswith("safetensors")}
        assert all(found[name] == whole[name] for name in names)
        noted = json.loads(found[JOURNAL])["finished"] if JOURNAL in found else {}
        assert noted.keys() <= names
        if found.keys() - {LOCK} == whole.keys():
            # Killed as the notes were gone: all is done, and nothing may be done to it.
            continue
        merged = merge(merge_folders, out)
        assert merged.kept == sorted(noted)
        assert contents(out) == whole
        shutil.rmtree(out)


def test_merge_killed_repeatedly_keeps_finished_files(merge_folders, tmp_path):
    """Each run comes a little further than the last; what it kept is not written again."""
    out, kept = tmp_path / "out", {}
    runs = 0
    while is_killed_at(25, lambda: merge(merge_folders, out)):
        runs += 1
        written = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        noted = json.loads((out / JOURNAL).read_bytes())["finished"]
        assert all(written[path] == when for path, when in kept.items())
        kept = {path: when for path, when in written.items() if path.name in noted}
    assert runs > 3
    assert contents(out) == contents(merge_folders / "whole")


def test_resumed_merge_reports_fidelity_of_all_layers(merge_folders, tmp_path):
    uninterrupted = merge(merge_folders, tmp_path / "one").fidelity
    assert is_killed_at(60, lambda: merge(merge_folders, tmp_path / "two"))
    assert merge(merge_folders, tmp_path / "two").fidelity == uninterrupted


@pytest.fixture
def half_merge(merge_folders, tmp_path) -> Path:
    """Where a merge was killed that had finished a few files."""
    assert is_killed_at(60, lambda: merge(merge_folders, tmp_path / "half"))
    finished = json.loads((tmp_path / "half" / JOURNAL).read_bytes())["finished"]
    assert {FIRST, SECOND} <= finished.keys()
    return tmp_path / "half"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit of the last tensor: the size is right."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [truncate, flip, Path.unlink])
def test_resumed_merge_rewrites_damaged_file(merge_folders, half_merge, spoil):
    first, second = (next(half_merge.glob(f"*{n}-of-*.safetensors")) for n in ("00001", "00002"))
    spoil(first)
    merged = merge(merge_folders, half_merge)
    assert first.name not in merged.kept
    assert second.name in merged.kept
    assert contents(half_merge) == contents(merge_folders / "whole")


def test_resumed_merge_does_not_trust_partial_file(merge_folders, half_merge):
    """Though it be as long as the file is to be."""
    last = max(merge_folders.glob("base/*.safetensors"))
    (half_merge / (last.name + durable.PARTIAL)).write_bytes(last.read_bytes())
    merge(merge_folders, half_merge)
    assert contents(half_merge) == contents(merge_folders / "whole")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"adapter": "lr=0.1"}, "not the same adapters, layers"),
        ({"weight": 0.5}, "not the same adapters"),
        ({"dtype": torch.float32}, "not the same dtype"),
    ],
)
def test_resume_refuses_merge_with_other_settings(merge_folders, half_merge, change, says):
    before = contents(half_merge)
    with pytest.raises(FileExistsError, match=f"unfinished merge of another kind .{says}"):
        merge(merge_folders, half_merge, **change)
    assert contents(half_merge) == before
    merge(merge_folders, half_merge)


@pytest.mark.parametrize("file", [FIRST, CONFIG, INDEX, "tokenizer.json"])
def test_resume_refuses_another_base(merge_folders, half_merge, tmp_path, file):
    shutil.copytree(merge_folders / "base", tmp_path / "base")
    shutil.copytree(merge_folders / "adapter", tmp_path / "adapter")
    file = (
        next((p.name for p in (tmp_path / "base").glob("*00001-of*")), file)
        if file == FIRST
        else file
    )
    (tmp_path / "base" / file).touch()
    with pytest.raises(FileExistsError, match="not the same base"):
        merge(tmp_path, half_merge)


def test_resume_accepts_moved_base_and_adapter(merge_folders, half_merge, tmp_path):
    """What they are counts, not where."""
    shutil.copytree(merge_folders / "base", tmp_path / "moved" / "base")
    shutil.copytree(merge_folders / "adapter", tmp_path / "moved" / "adapter")
    assert merge(tmp_path / "moved", half_merge).kept
    assert contents(half_merge) == contents(merge_folders / "whole")


def test_resume_refuses_damaged_journal(merge_folders, half_merge):
    (half_merge / JOURNAL).write_text("{")
    with pytest.raises(FileExistsError, match="is damaged: delete"):
        merge(merge_folders, half_merge)


def test_merge_refuses_folder_locked_by_another_process(merge_folders, half_merge):
    before = contents(half_merge)
    with durable.hold_lock(half_merge / LOCK):
        with pytest.raises(BlockingIOError, match="another process is merging into"):
            merge(merge_folders, half_merge)
        assert contents(half_merge) == before
    merge(merge_folders, half_merge)


def test_resume_needs_room_only_for_missing_files(merge_folders, tmp_path, monkeypatch):
    """Whole or aside: the rest must fit, no more."""
    needed = sum(map(len, contents(merge_folders / "whole").values()))
    assert is_killed_at(60, lambda: merge(merge_folders, tmp_path / "out"))
    weights = (tmp_path / "out").glob("*.safetensors*")
    left = needed - sum(path.stat().st_size for path in weights)
    assert left < needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=left))
    merge(merge_folders, tmp_path / "out")
