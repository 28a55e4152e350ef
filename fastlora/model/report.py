"""The report of what was done to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fastlora.config.listing import group_by_reason
from fastlora.functional.fidelity import Fidelity
from fastlora.inspection.first_forward import get_reading_module
from fastlora.inspection.wrappers import unwrap
from fastlora.model.record import RECORD, Injection
from fastlora.modules.layer import find_lora_layers
from fastlora.modules.served import MultiLoRALinear
from fastlora.modules.trained import find_trained_layers

# Functions that add what they know of layers of other kinds: fields of ``Report``.
describers: list[Callable[[nn.Module], dict[str, Any]]] = []


@dataclass(frozen=True)
class Report:
    """State of a model with LoRA; ``str()`` of it is for people.

    - replaced: {layer: rank}
    - skipped: {layer: reason}
    - trainable, total: how many parameters
    - merged: layers whose weight holds the adapter
    - fidelity: {merged layer: how much of its adapter has arrived}
    - untied: {layer: the weights that its own was tied with}
    - modules_to_save: modules that are trained whole
    - around: {replaced layer of a PEFT model: why its base computes its own output, onto which the
      adapter is added}
    - misstated: {layer of a PEFT model: which adapter runs at another rank or scaling than its
      config says}, as after hot-swapping, where PEFT saves what the config says
    - bypassed: {layer: the module whose forward read its weight, while the layer was never called}:
      its adapter has no effect
    """

    replaced: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0
    merged: tuple[str, ...] = ()
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    untied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    around: dict[str, str] = field(default_factory=dict)
    misstated: dict[str, str] = field(default_factory=dict)
    bypassed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        ranks = ", ".join(f"r={r}" for r in sorted(set(self.replaced.values())))
        lines = [
            f"{len(self.replaced)} layers replaced" + (f" ({ranks})" if ranks else ""),
            f"{self.trainable:,} of {self.total:,} parameters trainable ({share:.2f} %)",
            f"{len(self.merged)} layers merged",
        ]
        if self.modules_to_save:
            lines.append(f"trained whole: {', '.join(self.modules_to_save)}")
        if self.fidelity:
            worst = min(self.fidelity, key=lambda name: self.fidelity[name].gain)
            lines.append(f"least of its adapter arrived in {worst}: {self.fidelity[worst]}")
        lines += [f"untied {name} from {', '.join(of)}" for name, of in self.untied.items()]
        lines += [
            f"added onto the base's own output: {each}" for each in group_by_reason(self.around)
        ]
        lines += [f"not as PEFT would save it: {each}" for each in group_by_reason(self.misstated)]
        unseen = {name: f"never called, but read by {of}" for name, of in self.bypassed.items()}
        lines += [f"without effect: {each}" for each in group_by_reason(unseen)]
        lines += [f"skipped {each}" for each in group_by_reason(self.skipped)]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Reports what has been done to ``model``: replaced, skipped and why, trainable, merged.

    Of any model: one without LoRA layers has nothing replaced. Raises TypeError for no model.
    """
    inner = unwrap(model)
    layers = dict(find_lora_layers(inner))
    served = {
        n: m.lora_A.shape[1] for n, m in inner.named_modules() if isinstance(m, MultiLoRALinear)
    }
    trained = {name: layer.r for name, layer in find_trained_layers(inner)}
    parameters = list(inner.parameters())
    record: Injection | None = getattr(inner, RECORD, None)
    result = Report(
        replaced={name: layer.r for name, layer in layers.items()} | served | trained,
        skipped=dict(record.skipped) if record else {},
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        merged=tuple(name for name, layer in layers.items() if layer.merged),
        fidelity={n: layer.fidelity for n, layer in layers.items() if layer.fidelity is not None},
        untied={name: layer.untied for name, layer in layers.items() if layer.untied},
        modules_to_save=tuple(record.saved) if record else (),
        bypassed={
            n: reader
            for n, m in inner.named_modules()
            if (reader := get_reading_module(m)) is not None
        },
    )
    for describe in describers:
        details = describe(inner)
        merged = result.merged + details.pop("merged", ())
        fields = {key: getattr(result, key) | value for key, value in details.items()}
        result = replace(result, merged=merged, **fields)
    return result
