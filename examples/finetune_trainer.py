"""transformers' Trainer with LoRA: interrupted, resumed from the adapter alone, read by PEFT.

A small Llama that reads bytes learns text that comes with CPython, then an adapter one kind of it:
once without a stop, once stopped half-way and resumed by a new Trainer from a checkpoint that holds
the adapter without the base. Both must have the same losses, and PEFT the same logits.

    python examples/finetune_trainer.py [--steps 40] [--hidden 256] [--domain calendar]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastlora
from fastlora.demo.corpora import DOMAINS, make_domain_text, make_pretraining_text
from fastlora.demo.model import clone, cut_rows, make_byte_tokenizer, make_small_llama
from fastlora.integrations.transformers import AdapterCheckpoints

# Logits differ by the order of float32 sums.
TOLERANCE = 1e-4


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """Trainer, with checkpoints of the adapter alone."""


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def make_arguments(folder: Path, options: argparse.Namespace, **others: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.rows,
        gradient_accumulation_steps=options.accumulate,
        gradient_checkpointing=options.recompute,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=0,
        **others,
    )


def make_trainer(
    kind: type[Trainer], model: nn.Module, blocks: Tensor, settings: TrainingArguments
) -> Trainer:
    data = [{"input_ids": block, "labels": block} for block in blocks]
    run = kind(model=model, args=settings, train_dataset=data)
    run.remove_callback(transformers.PrinterCallback)
    return run


def read_losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def compute_logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids.to(next(model.parameters()).device)).logits.cpu()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domain", choices=list(DOMAINS), default="calendar")
    parser.add_argument("--rows", type=int, default=4, help="in a batch")
    parser.add_argument("--accumulate", type=int, default=2, help="batches a step")
    parser.add_argument("--recompute", action="store_true", help="activations, in backward")
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pretraining", type=int, default=60, help="steps of the base before")
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="where checkpoints and the adapter go")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    tokenizer = make_byte_tokenizer()
    base = make_small_llama(options.hidden, options.layers, len(tokenizer), seed=0)
    characters = 2 * options.rows * options.accumulate * options.length * options.steps
    general = cut_rows(tokenizer, make_pretraining_text(0, 200_000), 128)
    blocks = cut_rows(
        tokenizer, make_domain_text(options.domain, 0, characters).train, options.length
    )
    config = fastlora.LoRAConfig(
        r=options.rank, lora_alpha=2 * options.rank, lora_dropout=0.05, target_modules="all-linear"
    )
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        whole = {"max_steps": options.pretraining, "learning_rate": 2e-3, "save_strategy": "no"}
        make_trainer(Trainer, base, general, make_arguments(out / "base", options, **whole)).train()
        plain = clone(base)
        fastlora.replace_linear(base, config)
        print(fastlora.report(base))

        half = options.steps // 2
        tuning = {"max_steps": options.steps, "learning_rate": options.rate, "save_steps": half}
        unbroken = make_trainer(
            AdapterTrainer, clone(base), blocks, make_arguments(out / "unbroken", options, **tuning)
        )
        unbroken.train()
        stopped = make_trainer(
            AdapterTrainer, clone(base), blocks, make_arguments(out / "stopped", options, **tuning)
        )
        stopped.add_callback(StopAfter(half))
        stopped.train()
        resumed = make_trainer(
            AdapterTrainer, clone(base), blocks, make_arguments(out / "stopped", options, **tuning)
        )
        resumed.train(resume_from_checkpoint=True)
        checkpoint = out / "stopped" / f"checkpoint-{half}"
        size = (checkpoint / "adapter_model.safetensors").stat().st_size
        print(
            f"stopped after {half} of {options.steps} steps, resumed from {size:,} bytes of adapter"
        )
        want, got = read_losses(unbroken), read_losses(resumed)
        print(f"losses {want[0]:.4f} … {want[half]:.4f} … {want[-1]:.4f} without a stop")
        print(f"       {got[0]:.4f} … {got[half]:.4f} … {got[-1]:.4f} resumed")
        if want != got:
            raise SystemExit("the resumed run has other losses")

        fastlora.save_adapter(resumed.model, out / "adapter")
        theirs = peft.PeftModel.from_pretrained(plain, out / "adapter")
        ours, read = compute_logits(resumed.model, blocks[:4]), compute_logits(theirs, blocks[:4])
        distance = float((ours - read).norm() / ours.norm())
        print(f"PEFT reads the adapter; its logits are within {distance:.0e} of ours")
        if distance > TOLERANCE:
            raise SystemExit(f"PEFT's logits differ by {distance:.0e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
