"""transformers' Trainer: the adapter in its checkpoints, beside the model or instead of it.

Trainer trains a model of ``replace_linear`` as it is: it saves the whole state dict, base included,
and resumes from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from fastlora.adapters.files import WEIGHTS_NAME
from fastlora.model.load import load_adapter
from fastlora.model.save import adapter_state_dict, save_adapter
from fastlora.modules.dtensors import is_dtensor

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    _Trainer = Trainer
else:
    _Trainer = object


class SaveAdapter(TrainerCallback):
    """``Trainer(..., callbacks=[SaveAdapter()])``: PEFT's adapter files in every checkpoint too.

    Under ``fully_shard`` all processes gather, as they all call; otherwise the first one writes.
    """

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        model = kwargs["model"]
        if state.is_world_process_zero or any(map(is_dtensor, model.parameters())):
            save_adapter(model, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


class AdapterCheckpoints(_Trainer):
    """Mixed into a Trainer, its checkpoints hold the adapter's files and not the base.

    ``class MyTrainer(AdapterCheckpoints, Trainer): ...``, or TRL's. Resuming and
    ``load_best_model_at_end`` load the adapter, and checkpoints of whole models too. Under FSDP and
    DeepSpeed Trainer's own checkpoints are kept. Raises ValueError where more is trained than
    ``save_adapter`` saves.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = _as_module(self.model)
        saved = {id(tensor) for tensor in adapter_state_dict(model).values()}
        parameters = model.named_parameters()
        lost = [name for name, p in parameters if p.requires_grad and id(p) not in saved]
        if lost:
            raise ValueError(
                f"model: {len(lost)} parameters are trained that an adapter's files do not hold "
                f"({lost[0]}, …): freeze them, or use Trainer with SaveAdapter()"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            save_adapter(_as_module(self.model), folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")
        return None

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not _holds_adapter_alone(resume_from_checkpoint):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_adapter(_as_module(model or self.model), resume_from_checkpoint, is_trainable=True)
        return None

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not _holds_adapter_alone(best):
            return super()._load_best_model()
        load_adapter(_as_module(self.model), best, is_trainable=True)
        return None


def _as_module(model: Any) -> nn.Module:
    return model


def _holds_adapter_alone(checkpoint: str) -> bool:
    folder = Path(checkpoint)
    whole = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")]
    return (folder / WEIGHTS_NAME).is_file() and not whole
