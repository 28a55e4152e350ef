"""Adapters are read from handles: links are not followed, an exchange meanwhile is not seen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from fastlora.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from fastlora.serving.http import folder as folder_module
from fastlora.serving.http.folder import AdapterError, Folder
from tests.support.serving.http_server import save_adapters


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_adapters(tmp_path / "adapters", ("alice", "bob"))
    return tmp_path / "adapters"


def test_list_names_has_folders_with_a_config_alone(path, tmp_path):
    shutil.move(path / "bob", tmp_path / "outside")
    (path / "link").symlink_to(tmp_path / "outside")
    (path / "empty").mkdir()
    (path / "file").write_text("x")
    (path / "bad name").mkdir()
    (path / "inner").mkdir()
    (path / "inner" / CONFIG_NAME).symlink_to(path / "alice" / CONFIG_NAME)
    assert Folder(path).list_names() == ["alice"]


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../adapters/alice", "/", "absent", "x\0"])
def test_name_that_is_no_folder_there_is_refused(path, name):
    with pytest.raises(AdapterError):
        Folder(path).read(name)


def test_links_are_refused_wherever_they_lead(path):
    (path / "link").symlink_to("alice")
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        folder = path / f"with-{file}"
        shutil.copytree(path / "alice", folder)
        (folder / file).unlink()
        (folder / file).symlink_to(path / "alice" / file)
    for name in ("link", f"with-{CONFIG_NAME}", f"with-{WEIGHTS_NAME}"):
        with pytest.raises(AdapterError, match="no link"):
            Folder(path).read(name)


def test_pipe_and_long_file_are_refused(path):
    (path / "alice" / WEIGHTS_NAME).unlink()
    os.mkfifo(path / "alice" / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match="expected a file"):
        Folder(path).read("alice")
    with pytest.raises(AdapterError, match="at most 100 bytes"):
        Folder(path, most_bytes=100).read("bob")


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"PK\x03\x04" * 9, b"\xff" * 64])
def test_weights_that_are_no_safetensors_are_refused(path, content):
    (path / "alice" / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(AdapterError, match=WEIGHTS_NAME):
        Folder(path).read("alice")


def test_config_that_is_no_json_object_is_refused(path):
    for content in ("{", "[]", "[" * 100_000):
        (path / "alice" / CONFIG_NAME).write_text(content)
        with pytest.raises(AdapterError, match=CONFIG_NAME):
            Folder(path).read("alice")


def test_adapter_exchanged_while_it_is_read_is_read_as_it_was(path, monkeypatch):
    """Its folder, behind the config, and its file, behind the header's check."""
    expected, _ = Folder(path).read("alice")
    read, check = folder_module._read, folder_module.read_header

    def exchange_folder(folder: int, name: str, file: str, most: int) -> bytes:
        data = read(folder, name, file, most)
        if file == CONFIG_NAME:
            (path / "alice").rename(path / "moved")
            shutil.copytree(path / "bob", path / "alice")
        return data

    def exchange_file(*args):
        found = check(*args)
        shutil.copy(path / "bob" / WEIGHTS_NAME, path / "moved" / WEIGHTS_NAME)
        return found

    monkeypatch.setattr(folder_module, "_read", exchange_folder)
    monkeypatch.setattr(folder_module, "read_header", exchange_file)
    found, _ = Folder(path).read("alice")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_folder_stays_the_one_that_was_opened(path, tmp_path):
    folder = Folder(path)
    path.rename(tmp_path / "moved")
    path.mkdir()
    assert folder.list_names() == ["alice", "bob"]
    folder.close()
    folder.close()


def test_read_leaves_no_handles_open(path):
    folder = Folder(path)
    before = len(os.listdir("/proc/self/fd"))
    folder.read("alice")
    (path / "bob" / WEIGHTS_NAME).unlink()
    with pytest.raises(AdapterError):
        folder.read("bob")
    assert len(os.listdir("/proc/self/fd")) == before
