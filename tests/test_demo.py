"""The demo at toy sizes, end to end; what it asserts, reads and refuses."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers", reason="the demo trains a transformers model")
pytest.importorskip("peft", reason="the demo compares with PEFT")
pytest.importorskip("rich", reason="the demo prints tables with rich")

from fastlora import demo
from fastlora.cli import main
from fastlora.demo import corpora, merge
from fastlora.demo.claims import Claims
from fastlora.demo.model import byte_tokenizer, rows, small_llama

EXACT = (
    "PEFT and fastlora have the same losses",
    "adapters saved by fastlora give the same logits in PEFT",
    "every row equals its adapter run alone",
    "merged, the model gives the same logits",
    "every bit of every tensor is back",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's model and text: (directory, file)."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = byte_tokenizer()
    small_llama(64, 2, len(tokenizer), seed=3).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(corpora.domain_text("records", 5, 12_000).train, "utf-8")
    return folder / "model", folder / "text.txt"


def test_quick_demo_shows_everything_and_holds(capsys):
    assert main(["demo", "--quick"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for domain in corpora.DOMAINS:
        assert domain in shown
    for words in ("LoRA", "full", "last layer only", "tokens/s", "optimizer", "held-out loss"):
        assert words in shown
    marks = shown.partition("What was claimed")[2]
    assert marks.count("✓") >= len(EXACT)
    assert "✗" not in marks


def test_a_claim_that_fails_fails_the_demo(own, monkeypatch, capsys):
    """Here unmerging that is said to leave a tensor changed."""
    found = merge.different
    monkeypatch.setattr(merge, "different", lambda a, b: [*found(a, b), "planted"])
    assert demo.run(str(own[0]), str(own[1]), quick=True) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "✗ unmerged, every bit of every tensor is back" in shown


def test_own_model_and_text(own, capsys):
    assert demo.run(str(own[0]), str(own[1]), quick=True) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "text" in shown
    assert all(domain not in shown for domain in ("morse", "unicode"))


def test_claims():
    claims = Claims()
    assert claims.exit_code == 1  # a demo that claims nothing has shown nothing
    claims.check("a", True, "")
    claims.check("b", False, "", counts=False)
    assert claims.exit_code == 0
    claims.check("c", False, "2 > 1")
    assert [claim.sentence for claim in claims.failed] == ["c"]
    assert claims.exit_code == 1


@pytest.mark.parametrize("domain", corpora.DOMAINS)
def test_text_is_the_same_every_time_and_unlike_the_others(domain):
    text = corpora.domain_text(domain, 0, 5000)
    assert text == corpora.domain_text(domain, 0, 5000)
    assert text != corpora.domain_text(domain, 1, 5000)
    assert 0 < len(text.held_out) < len(text.train)
    if domain != "calendar":  # its lines are weeks, which months share
        assert not set(text.held_out.splitlines()) & set(text.train.splitlines())
    others = (
        corpora.domain_text(name, 0, 5000).train for name in corpora.DOMAINS if name != domain
    )
    assert all(text.train[:40] not in other for other in others)


def test_the_tokenizer_spells_everything():
    tokenizer = byte_tokenizer()
    text = "ASCII, Größe, 漢字\n\t"
    tokens = rows(tokenizer, text, 1).flatten()
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "expected a text file, found none"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"too short", "expected at least"),
        (b"\xff\xfe\x00", "expected UTF-8"),
    ],
)
def test_text_that_cannot_be_used(content, message, own, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert demo.run(str(own[0]), str(path), quick=True) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_that_cannot_be_used(own, tmp_path, capsys):
    for path in (tmp_path / "nowhere", tmp_path):
        assert demo.run(str(path), str(own[1]), quick=True) == 2
        assert "model: " in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    for name in [n for n in sys.modules if n.startswith("fastlora.demo.")] + ["rich.console"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(demo, "story", raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert demo.run(quick=True) == 2
    assert "pip install .[demo]" in capsys.readouterr().err
