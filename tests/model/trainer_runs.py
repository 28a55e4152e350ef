"""Runs of transformers' Trainer: whole, or in a process that is killed in the middle.

`python -m tests.model.trainer_runs FOLDER` starts one of each kind and kills it, as a machine
would; under torchrun all processes train together.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from torch import distributed, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import fastlora
from fastlora.integrations.transformers import AdapterCheckpoints, SaveAdapter
from tests.support.models import llama, randomise_lora

# With dropout, so that what a resumed run draws must go on where the killed one was.
SETTINGS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
STEPS, KILLED_AFTER = 6, 5


class AdapterTrainer(AdapterCheckpoints, Trainer):
    pass


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def data(rows: int = 48) -> list[dict[str, torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return [{"input_ids": row, "labels": row} for row in torch.randint(1, 97, (rows, 12))]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "seed": 3,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(settings | options))


def model(kind: str = "whole", **settings: Any) -> nn.Module:
    """The same for each kind but for the library."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(**(SETTINGS | settings))
        if kind == "peft":
            return randomise_lora(peft.get_peft_model(llama(), config))
        return randomise_lora(fastlora.replace_linear(llama(), config))


def trainer(folder: Path, kind: str = "whole", **options: Any) -> Trainer:
    of = model(kind) if "model" not in options else options.pop("model")
    callbacks = options.pop("callbacks", [])
    evaluated = options.pop("eval_dataset", None)
    run = (AdapterTrainer if kind == "adapter" else Trainer)(
        model=of,
        args=arguments(folder, **options),
        train_dataset=data(),
        eval_dataset=evaluated,
        callbacks=[*callbacks, SaveAdapter()] if kind == "whole" else callbacks,
    )
    run.remove_callback(PrinterCallback)
    return run


def finished_trainer(*args: Any, **options: Any) -> Trainer:
    """A trainer that has trained, at once: its order of rows comes from the seed that it set."""
    run = trainer(*args, **options)
    run.train()
    return run


def losses(run: Trainer) -> dict[int, float]:
    """Of each step."""
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


KINDS = ("whole", "adapter", "peft")


def train_in_processes(folder: Path) -> None:
    """Each process takes its rows of a batch; prints the losses of a run and of one resumed."""
    each = arguments(folder).per_device_train_batch_size // int(os.environ["WORLD_SIZE"])
    for kind in ("whole", "adapter"):
        for checkpoint in (None, str(folder / kind / "checkpoint-4")):
            run = trainer(
                folder / kind,
                kind,
                model=model(kind, lora_dropout=0.0),
                per_device_train_batch_size=each,
                ddp_backend="gloo",
            )
            run.train(resume_from_checkpoint=checkpoint)
            if run.is_world_process_zero():
                print(json.dumps([kind, *losses(run).values()]), flush=True)
    # Left to the interpreter's exit, gloo's threads may outlive what they use: an abort, at times.
    distributed.barrier()
    distributed.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        return train_in_processes(folder)
    for kind in KINDS:
        child = os.fork()
        if child == 0:
            trainer(folder / kind, kind, callbacks=[Kill()]).train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(kind, os.WIFSIGNALED(status) and os.WTERMSIG(status))
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
