"""transformers' Trainer trains, saves, resumes and recomputes models with adapters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import peft
import torch
from transformers import Trainer

import fastlora
from fastlora import LoRAConfig
from tests.model.trainer_runs import (
    KILLED_AFTER,
    KINDS,
    STEPS,
    arguments,
    data,
    finished_trainer,
    losses,
    model,
    trainer,
)
from tests.support.models import assert_agree, error, llama, logits, tokens

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of runs of every kind, each killed with SIGKILL after its fifth step."""
    folder = tmp_path_factory.mktemp("killed")
    said = _run_python("-m", "tests.model.trainer_runs", str(folder))
    for kind in KINDS:
        assert f"{kind} {int(signal.SIGKILL)}" in said
    return folder


def _run_python(*arguments: str) -> list[str]:
    """The lines that python prints with these arguments."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command, environment = [sys.executable, *arguments], os.environ | own
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.full  # losses, files and biases are quick
@pytest.mark.parametrize("kind", KINDS)
def test_killed_trainer_resumes_with_the_same_losses(kind, killed_runs, tmp_path):
    unbroken = trainer(tmp_path, kind)
    unbroken.train()
    assert (killed_runs / kind / "checkpoint-4").is_dir()
    assert not (killed_runs / kind / "checkpoint-6").exists()
    resumed = trainer(killed_runs / kind, kind)
    resumed.train(resume_from_checkpoint=True)
    want = losses(unbroken)
    assert len(want) == STEPS > KILLED_AFTER
    # To the last bit, dropout masks and the optimizer's moments included.
    assert losses(resumed) == want
    for (name, got), expected in zip(
        resumed.model.named_parameters(), unbroken.model.parameters(), strict=True
    ):
        assert torch.equal(got, expected), name


def test_trainer_losses_match_those_of_peft(tmp_path):
    models = {kind: model(kind, lora_dropout=0.0) for kind in ("whole", "peft")}
    peft.set_peft_model_state_dict(models["peft"], fastlora.adapter_state_dict(models["whole"]))
    ours, theirs = (finished_trainer(tmp_path / kind, kind, model=m) for kind, m in models.items())
    # Adam divides by what may be tiny, so that differences of rounding grow from step to step.
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3)


def test_trainer_checkpoints_load_in_peft(tmp_path):
    for kind in ("whole", "adapter"):
        run = trainer(tmp_path / kind, kind)
        run.train()
        last = tmp_path / kind / f"checkpoint-{STEPS}"
        assert (last / "model.safetensors").exists() == (kind == "whole")
        run.model.eval()
        ids = tokens(2, 9)
        theirs = peft.PeftModel.from_pretrained(llama(), last).eval()
        assert_agree(logits(theirs, ids), logits(run.model, ids), logits(llama(), ids))
        first = fastlora.load_adapter(llama(), tmp_path / kind / "checkpoint-2")
        assert error(logits(first, ids), logits(run.model, ids)) > 1e-3
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / kind / "checkpoint-2").glob("*model*"))
        for kind in ("whole", "adapter")
    ]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.full  # losses, files and biases are quick
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_trainer_loads_best_checkpoint_at_end(kind, tmp_path):
    run = trainer(
        tmp_path, kind, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, eval_dataset=data(8),
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    loaded = fastlora.load_adapter(llama(), best)
    for key, want in fastlora.adapter_state_dict(loaded).items():
        got = fastlora.adapter_state_dict(run.model)[key]
        assert torch.equal(got, want)
        assert got.requires_grad


def test_adapter_checkpoints_refuse_parameters_they_would_lose(tmp_path):
    thawed = model()
    thawed.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters are trained .* \(lm_head.weight, …\)"):
        trainer(tmp_path, "adapter", model=thawed)
    with pytest.raises(RuntimeError, match="found none"):
        trainer(tmp_path, "adapter", model=llama())


@pytest.mark.full  # losses, files and biases are quick
def test_accumulated_small_batches_match_one_big_batch(tmp_path):
    runs = [
        trainer(
            tmp_path, model=model(lora_dropout=0.0), per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size, save_strategy="no",
        )
        for size in (8, 2)
    ]  # fmt: skip
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-3)


@pytest.mark.full  # tests/distributed/test_distributed.py trains in two processes
def test_two_processes_train_as_one_process(tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = _run_python("-m", *torchrun, "-m", "tests.model.trainer_runs", str(tmp_path))
    runs = [json.loads(line) for line in said if line.startswith('["')]
    one = finished_trainer(tmp_path / "one", model=model(lora_dropout=0.0))
    want = list(losses(one).values())
    assert [kind for kind, *_ in runs] == ["whole", "whole", "adapter", "adapter"]
    for _, *got in runs:
        assert got == pytest.approx(want, rel=1e-3)
    # A resumed run goes on as if it had never stopped.
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]
    for kind in ("whole", "adapter"):
        loaded = fastlora.load_adapter(llama(), tmp_path / kind / f"checkpoint-{STEPS}")
        mine, others = (fastlora.adapter_state_dict(m) for m in (one.model, loaded))
        assert max(error(others[key], mine[key]) for key in mine) < 1e-2


@pytest.mark.full  # losses, files and biases are quick
@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_recomputes_activations_with_same_losses(reentrant, tmp_path):
    """Embeddings are frozen, so that what enters the first block must be made to need gradients."""
    runs = [
        finished_trainer(tmp_path, save_strategy="no", **options)
        for options in (
            {},
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            },
        )
    ]
    # Dropout masks come back in the recomputation, or gradients would be another loss's.
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)


def test_trainer_trains_and_resumes_biases(tmp_path):
    config = LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], bias="all")
    base = llama(attention_bias=True)
    run = trainer(tmp_path, "adapter", model=fastlora.replace_linear(base, config))
    run.train()
    model = fastlora.replace_linear(llama(attention_bias=True), config)
    again = trainer(tmp_path, "adapter", model=model)
    again._load_from_checkpoint(str(tmp_path / f"checkpoint-{STEPS}"))
    for (name, got), want in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_trainer_takes_model_but_refuses_merged_one(tmp_path):
    """Labels by name, no columns lost, nothing that a merged model could be trained by."""
    run = Trainer(model=model(), args=arguments(tmp_path), train_dataset=data())
    assert run.label_names == ["labels"]
    assert run.get_num_trainable_parameters() == fastlora.report(run.model).trainable
    fastlora.merge_adapter(run.model)
    with pytest.raises(RuntimeError, match="merged, so its adapter would not be trained"):
        run.train()
