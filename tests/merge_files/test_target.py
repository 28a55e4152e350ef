"""Merging into existing folders, full disks and folders that other processes use."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastlora.merge_files import durable, journal, merge_folder
from tests.support.checkpoints import CONFIG, contents
from tests.support.models import quiet

pytestmark = [
    quiet,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of its own"),
]


def merge(
    merge_folders: Path, out: Path, *, adapter: str = "adapter", weight: float = 1.0, **options: Any
):
    return merge_folder(merge_folders / "base", [(merge_folders / adapter, weight)], out, **options)


@pytest.mark.parametrize("what", ["merged", "strange", "file", "dangling"])
def test_merge_refuses_output_path_that_exists(merge_folders, tmp_path, what):
    out = tmp_path / "out"
    if what == "merged":
        merge(merge_folders, out)
    elif what == "strange":
        out.mkdir()
        (out / "thesis.tex").write_text("…")
    elif what == "file":
        out.write_text("…")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="out: expected a new folder"):
        merge(merge_folders, out)
    assert contents(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()


def test_merge_accepts_empty_output_folder(merge_folders, tmp_path):
    """As a run leaves it that is killed at once."""
    (tmp_path / "out").mkdir()
    merge(merge_folders, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(merge_folders / "whole")


def test_merge_refuses_output_folder_it_cannot_make(merge_folders, tmp_path):
    (tmp_path / "file").write_text("…")
    with pytest.raises(OSError, match=r"out: .*file/out cannot be made: Not a directory"):
        merge(merge_folders, tmp_path / "file" / "out")


def test_merge_refuses_folder_finished_by_another_process(merge_folders, tmp_path, monkeypatch):
    """Seen unfinished, found finished: it is left as it is, without a lock file."""
    merge(merge_folders, tmp_path / "out")
    monkeypatch.setattr(journal.os.path, "lexists", lambda path: False)
    with pytest.raises(FileExistsError, match="holds a model already"):
        merge(merge_folders, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(merge_folders / "whole")


def test_merge_refuses_full_disk_before_writing(merge_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    with pytest.raises(
        OSError, match=r"out: .* needs \d+,\d+ bytes, 30,000 are free at"
    ) as refused:
        merge(merge_folders, tmp_path / "some" / "out")
    assert refused.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_merge_resumes_after_the_disk_was_full(merge_folders, tmp_path, monkeypatch):
    """As the sixth file comes; with room again the same call goes on."""
    out, count, fsync = tmp_path / "out", iter(range(1 << 30)), os.fsync

    def full(handle: int) -> None:
        if next(count) == 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"no room to write it \(No space left"):
            merge(merge_folders, out)
    assert not list(out.glob("*" + durable.PARTIAL))
    assert not (out / CONFIG).exists()
    assert merge(merge_folders, out).kept
    assert contents(out) == contents(merge_folders / "whole")


def test_merge_resumes_after_file_size_limit(merge_folders, tmp_path):
    """A real error of a real write: within a tensor, not between."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match=r"safetensors: no room to write it \(File too large\)"):
            merge(merge_folders, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").glob("*" + durable.PARTIAL))
    merge(merge_folders, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(merge_folders / "whole")


def test_durable_write_passes_errors_on_unchanged(tmp_path):
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("x")

    (tmp_path / "file").write_text("before")
    with pytest.raises(KeyError):
        durable.write(tmp_path / "file", chunks())
    assert contents(tmp_path) == {"file": b"before"}


def test_read_chunks_raises_past_end_of_file(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert b"".join(durable.read_chunks(tmp_path / "file", 1, 3)) == b"234"
    with pytest.raises(RuntimeError, match="it ends 2 bytes early"):
        list(durable.read_chunks(tmp_path / "file", 3, 4))
