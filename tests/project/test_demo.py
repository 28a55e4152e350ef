"""The demo runs at toy sizes, with its exit codes, texts and errors."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import fastlora
from fastlora.commands import main as cli
from fastlora.demo import corpora, run
from fastlora.demo.claims import Claims
from fastlora.demo.model import make_byte_tokenizer, make_small_llama

SHAPES = {
    "calendar": r"Mo Tu We Th Fr Sa Su\n[ \d\n]+\n",
    "unicode": r"U\+[0-9A-F]{4} [A-Z]",
    "records": r'"status": \d{3}, "reason": "',
    "morse": r"[.-]+ [.-]+ / [.-]+ ",
}


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tokenizer = make_byte_tokenizer()
    tokenizer.save_pretrained(directory)
    make_small_llama(hidden=32, layers=2, vocabulary=len(tokenizer), seed=0).save_pretrained(
        directory
    )
    return directory


@pytest.fixture
def own_data(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(200)))
    return path


def test_quick_demo_run_passes_its_claims(capsys):
    assert cli.main(["demo", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("✓") >= 5
    assert "✗" not in shown
    for name in (*corpora.DOMAINS, "full", "last layer only", "LoRA", "PEFT", "tokens/s"):
        assert name in shown


@pytest.mark.full  # the quick demo stands for it
def test_demo_accepts_given_model_and_data(own_model, own_data, capsys):
    assert run(str(own_model), str(own_data), quick=True) == 0
    shown = capsys.readouterr().out
    assert "verse" in shown
    assert str(own_model) in shown
    assert "calendar" not in shown


def test_demo_exits_1_when_a_claim_fails(own_model, own_data, capsys, monkeypatch):
    monkeypatch.setattr(fastlora, "unmerge_adapter", lambda model: model)
    assert run(str(own_model), str(own_data), quick=True) == 1
    assert capsys.readouterr().out.count("✗") == 1


def test_claims_exit_code_counts_failed_claims():
    claims = Claims()
    assert claims.exit_code == 1, "nothing was shown"
    claims.check("one", True, "")
    claims.check("two", False, "", counts=False)
    assert claims.exit_code == 0
    claims.check("three", False, "")
    assert claims.exit_code == 1
    assert [claim.sentence for claim in claims.failed] == ["three"]


@pytest.mark.parametrize("name", corpora.DOMAINS)
def test_domain_texts_are_deterministic_and_distinguishable(name):
    text = corpora.make_domain_text(name, 0, 20_000)
    assert text == corpora.make_domain_text(name, 0, 20_000)
    assert text != corpora.make_domain_text(name, 1, 20_000)
    assert 1_000 < len(text.held_out) < len(text.train) / 3
    assert {n for n, shape in SHAPES.items() if re.search(shape, text.train)} == {name}
    assert {n for n, shape in SHAPES.items() if re.search(shape, text.held_out)} == {name}


@pytest.mark.parametrize("name", ["calendar", "unicode"])
def test_held_out_text_is_not_in_training_text(name):
    text = corpora.make_domain_text(name, 0, 50_000)
    pattern = {"calendar": r"\w+ \d{4}\n\w\w ", "unicode": r"U\+\w+"}[name]
    seen, unseen = (set(re.findall(pattern, part)) for part in (text.train, text.held_out))
    assert unseen
    assert not seen & unseen


def test_pretraining_text_is_deterministic():
    text = corpora.make_pretraining_text(0, 600_000)
    assert text == corpora.make_pretraining_text(0, 600_000)
    assert text != corpora.make_pretraining_text(1, 600_000)
    assert len(text) == 600_000
    assert "def " in text


def test_byte_tokenizer_gives_back_every_byte():
    tokenizer = make_byte_tokenizer()
    text = "  naïve ♥\n\tx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "expected a text file"),
        (b"", "empty"),
        (b" \n", "empty"),
        (b"too short", "at least"),
        (b"\xff\xfe\x00 latin", "UTF-8"),
    ],
)
def test_demo_explains_unusable_data_in_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    assert run(data=str(path), quick=True) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert error.count("\n") == 1


def test_demo_explains_unusable_model(tmp_path, capsys):
    assert run(str(tmp_path / "none"), quick=True) == 2
    assert "expected a directory" in capsys.readouterr().err
    assert run(str(tmp_path), quick=True) == 2
    assert "cannot load" in capsys.readouterr().err


@pytest.mark.full  # the quick demo stands for it
def test_demo_names_missing_package_in_one_line():
    code = "import sys; sys.modules['rich'] = None; from fastlora.demo import run; sys.exit(run())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    said = ran.stderr.splitlines()[-1]  # before it bitsandbytes may have said what it lacks
    assert said.startswith("fastlora demo: needs rich")
    assert "pip install .[demo]" in said
