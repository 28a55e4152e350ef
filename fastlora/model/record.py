"""The record, kept on a model, of what was done to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from fastlora.config import LoRAConfig
from fastlora.inspection.layers import find_peft_layers
from fastlora.inspection.wrappers import unwrap
from fastlora.modules.saved_modules import SavedModule
from fastlora.modules.trained import find_trained_layers
from fastlora.modules.training_rows import TrainingRows
from fastlora.rows.watch import Watch

RECORD = "_fastlora_injection"


@dataclass(frozen=True)
class Injection:
    """Settings that ``replace_linear`` was given, and what it left alone and why.

    rows: of several adapters in training, which the batch's rows belong to; watch: where it comes
    into the model. saved: by name, the modules that are trained whole. carried: tensors of the
    base, by their names in PEFT's files, in which an adapter has put rows of its own.
    """

    config: LoRAConfig
    skipped: dict[str, str]
    rows: TrainingRows | None = None
    saved: dict[str, SavedModule] = field(default_factory=dict)
    carried: frozenset[str] = frozenset()
    watch: Watch | None = None


def get_injection(model: nn.Module) -> Injection:
    """Returns what ``replace_linear`` noted on ``model``; RuntimeError when it never ran."""
    record = getattr(unwrap(model), RECORD, None)
    if record is None:
        raise RuntimeError(
            "model: expected one that went through fastlora.replace_linear, found "
            f"{_describe_layers(model)}"
        )
    return record


def make_missing_error(model: nn.Module) -> RuntimeError:
    """Makes the error for a model without ``FastLoRALinear``; it says what there is instead."""
    description = _describe_layers(model)
    return RuntimeError(f"model: expected one with FastLoRALinear layers, found {description}")


def get_saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """Returns the modules of ``model`` that are trained whole, by name; often none."""
    record: Injection | None = getattr(unwrap(model), RECORD, None)
    return dict(record.saved) if record else {}


def get_carried(model: nn.Module) -> frozenset[str]:
    """Returns the tensors of ``model``'s base in which an adapter's rows are; often none."""
    record: Injection | None = getattr(unwrap(model), RECORD, None)
    return record.carried if record else frozenset()


def get_training_rows(model: nn.Module) -> TrainingRows:
    """Returns what ``use_adapters`` tells the layers of ``model``."""
    rows = get_injection(model).rows
    if rows is None:
        raise RuntimeError(
            "model: expected one with several adapters, of replace_linear(..., adapter_names=)"
        )
    return rows


def _describe_layers(model: nn.Module) -> str:
    if next(find_trained_layers(model), None) is not None:
        return "several adapters in training: save one and load it alone"
    if find_peft_layers(unwrap(model)):
        return (
            "PEFT's: call the PEFT model's own methods, patched or not (save_pretrained, "
            "merge_adapter, disable_adapter, …)"
        )
    return "none"


def remember(model: nn.Module, record: Injection) -> None:
    """Notes on ``model`` what its LoRA layers are, for ``injection``."""
    setattr(unwrap(model), RECORD, record)


def forget(model: nn.Module) -> None:
    """Takes the note away, where there is one."""
    vars(unwrap(model)).pop(RECORD, None)
