"""Putting LoRA into a whole model, and saying what was done to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from fastlora.adapter_files import check_name
from fastlora.config import LoRAConfig
from fastlora.fidelity import Fidelity
from fastlora.modules import FastLoRALinear, lora_layers
from fastlora.multi_modules import (
    MultiLoRALinear,
    TrainableMultiLoRALinear,
    TrainingRows,
    trained_layers,
)
from fastlora.wrapping import unsupported, unwrapped

_RECORD = "_fastlora_injection"


@dataclass(frozen=True)
class Injection:
    """What ``replace_linear`` was asked for, and what it left alone and why.

    rows: of several adapters in training, which the batch's rows belong to.
    """

    config: LoRAConfig
    skipped: dict[str, str]
    rows: TrainingRows | None = None


@dataclass(frozen=True)
class Plan:
    """Linears to replace, {first full name: (module, all its names)}, and others skipped, why."""

    linears: dict[str, tuple[nn.Linear, list[str]]]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Report:
    """The state of a model with LoRA; ``str()`` of it is for people.

    replaced: {layer: rank}; skipped: {layer: reason}; trainable and total: parameters; fidelity:
    {merged layer: how much of its adapter has arrived}; untied: {layer: whose weight its was};
    merged:
    layers whose weight holds the adapter.
    """

    replaced: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0
    merged: tuple[str, ...] = ()
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    untied: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total if self.total else 0.0
        ranks = ", ".join(f"r={r}" for r in sorted(set(self.replaced.values())))
        lines = [
            f"{len(self.replaced)} layers replaced" + (f" ({ranks})" if ranks else ""),
            f"{self.trainable:,} of {self.total:,} parameters trainable ({share:.2f} %)",
            f"{len(self.merged)} layers merged",
        ]
        if self.fidelity:
            worst = min(self.fidelity, key=lambda name: self.fidelity[name].gain)
            lines.append(f"least of its adapter arrived in {worst}: {self.fidelity[worst]}")
        lines += [f"untied {name} from {', '.join(of)}" for name, of in self.untied.items()]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def replace_linear(
    model: nn.Module,
    config: object,
    *,
    freeze_base: bool = True,
    adapter_names: Sequence[str] | None = None,
) -> nn.Module:
    """Replaces in place the linears that ``config`` names by ``FastLoRALinear``; returns ``model``.

    config: ``LoRAConfig`` or ``peft.LoraConfig``. freeze_base: everything but the adapters (and the
    biases that ``config.bias`` asks for) stops requiring gradients. adapter_names: several adapters
    on the one base instead, trained together: ``use_adapters`` says whose each row of a batch is,
    ``save_adapter(..., adapter_name=)`` saves one. ``report(model)`` says what was replaced and
    what was skipped and why.

    Raises ValueError, the model unchanged, when nothing matches (near names are listed), when a
    layer that was named cannot be replaced, or the model has LoRA layers already; for several
    adapters also when ``config`` asks for biases, which belong to no single one.
    """
    settings = LoRAConfig.of(config)
    model = _checked(model)
    rows = None if adapter_names is None else _rows_for(adapter_names, settings)
    chosen = plan(model, settings)
    present = [name for name, _ in (*lora_layers(model), *trained_layers(model))]
    if present:
        raise ValueError(
            f"model: {len(present)} layers have LoRA already ({present[0]}, …) and one config must "
            "speak for all: name all layers at once, rank_pattern and alpha_pattern tell them apart"
        )
    layers = {
        name: _layer(name, linear, settings, rows) for name, (linear, _) in chosen.linears.items()
    }
    for name, layer in layers.items():
        swap(model, chosen.linears[name][1], layer)
    remember(model, Injection(settings, chosen.skipped, rows))
    if freeze_base:
        _freeze(unwrapped(model), settings)
    return model


def report(model: nn.Module) -> Report:
    """What has been done to ``model``: replaced, skipped and why, trainable, merged."""
    inner = unwrapped(model)
    layers = dict(lora_layers(inner))
    served = {
        n: m.lora_A.shape[1] for n, m in inner.named_modules() if isinstance(m, MultiLoRALinear)
    }
    trained = {name: layer.r for name, layer in trained_layers(inner)}
    parameters = list(inner.parameters())
    record: Injection | None = getattr(inner, _RECORD, None)
    return Report(
        replaced={name: layer.r for name, layer in layers.items()} | served | trained,
        skipped=dict(record.skipped) if record else {},
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        merged=tuple(name for name, layer in layers.items() if layer.merged),
        fidelity={n: layer.fidelity for n, layer in layers.items() if layer.fidelity is not None},
        untied={name: layer.untied for name, layer in layers.items() if layer.untied},
    )


def injection(model: nn.Module) -> Injection:
    """What ``replace_linear`` noted on ``model``; RuntimeError when it never ran."""
    record = getattr(unwrapped(model), _RECORD, None)
    if record is None:
        raise RuntimeError("model: expected one that went through fastlora.replace_linear")
    return record


def training_rows(model: nn.Module) -> TrainingRows:
    """What ``use_adapters`` tells the layers of ``model``."""
    rows = injection(model).rows
    if rows is None:
        raise RuntimeError(
            "model: expected one with several adapters, of replace_linear(..., adapter_names=)"
        )
    return rows


def remember(model: nn.Module, record: Injection) -> None:
    """Notes on ``model`` what its LoRA layers are, for ``injection``."""
    setattr(unwrapped(model), _RECORD, record)


def forget(model: nn.Module) -> None:
    """Takes the note away, where there is one."""
    vars(unwrapped(model)).pop(_RECORD, None)


def plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Which linears of ``model`` ``config`` names, checked; nothing is changed."""
    if config.target_modules is None:
        raise ValueError(
            "target_modules: expected a list of names, a regular expression or "
            '"all-linear", got None'
        )
    inner = unwrapped(model)
    # A module reached by two names is one layer, to be replaced under both.
    names: dict[nn.Module, list[str]] = {}
    for name, module in inner.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(module, []).append(name)
    linears: dict[str, tuple[nn.Linear, list[str]]] = {}
    skipped: dict[str, str] = {}
    refused: dict[str, str] = {}
    head = _output_embedding(inner)
    for module, known_as in names.items():
        first = known_as[0]
        named = any(config.targets(name) for name in known_as)
        if not named and not (config.all_linear and isinstance(module, nn.Linear)):
            continue
        reason = _bypassed(inner, known_as) or unsupported(module)
        if any(config.excludes(name) for name in known_as):
            skipped[first] = "excluded by exclude_modules"
        elif getattr(module, "holds_lora", False):
            refused[first] = str(reason)
        elif not named and module is head:
            skipped[first] = 'the output embedding, which "all-linear" leaves out'
        elif reason is not None:
            (refused if named else skipped)[first] = reason
        elif isinstance(module, nn.Linear):
            linears[first] = (module, known_as)
    if refused:
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(
            f"target_modules: cannot replace {listed} (name other layers, or use exclude_modules)"
        )
    if not linears:
        raise ValueError(_no_match(inner, config, skipped))
    return Plan(linears, skipped)


def swap(model: nn.Module, names: Iterable[str], layer: nn.Module) -> None:
    """Puts ``layer`` where ``model`` has a module under each of ``names``."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(unwrapped(model).get_submodule(parent), child, layer)


def _rows_for(adapter_names: Sequence[str], config: LoRAConfig) -> TrainingRows:
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names: expected a list of names, got {adapter_names!r}")
    names = [check_name(name) for name in adapter_names]
    if not names or len(set(names)) < len(names) or "__base__" in names:
        raise ValueError(f'adapter_names: expected different names, none "__base__", got {names!r}')
    if config.lora_bias or config.bias != "none":
        raise ValueError(
            "config: of adapters trained together none has biases of its own, got "
            f"lora_bias={config.lora_bias}, bias={config.bias!r}"
        )
    return TrainingRows(names)


def _layer(
    name: str, linear: nn.Linear, config: LoRAConfig, rows: TrainingRows | None
) -> nn.Linear:
    options = {
        "lora_alpha": config.alpha_of(name),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "init_lora_weights": config.init_lora_weights,
    }
    r = config.rank_of(name)
    if rows is not None:
        return TrainableMultiLoRALinear.from_linear(linear, rows, r, **options)
    return FastLoRALinear._sharing(linear, r, lora_bias=config.lora_bias, **options)


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(unwrapped(model), nn.Linear):
        raise ValueError(
            "model: expected a module that contains linears, got a linear itself: use "
            "FastLoRALinear.from_linear"
        )
    return model


def _bypassed(model: nn.Module, names: list[str]) -> str | None:
    """Why a layer's own forward would not be what its parent runs."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight and never calls it"
        if isinstance(parent, nn.TransformerEncoderLayer) and child in ("linear1", "linear2"):
            return "nn.TransformerEncoderLayer's fast path reads its weight and does not call it"
    return None


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def _no_match(model: nn.Module, config: LoRAConfig, skipped: dict[str, str]) -> str:
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    message = f"target_modules: no linear layer matches {config.target_modules!r}"
    if skipped:
        message += (
            f" ({len(skipped)} skipped: {'; '.join(f'{n}: {r}' for n, r in skipped.items())})"
        )
    if not linears:
        return message + "; the model has no nn.Linear"
    suffixes = sorted({name.rpartition(".")[2] for name in linears})
    wanted = config.target_modules or ()
    wanted = [wanted] if isinstance(wanted, str) else wanted
    near = [m for w in wanted for m in difflib.get_close_matches(w, suffixes + linears, cutoff=0.5)]
    hint = f"; near names: {', '.join(dict.fromkeys(near))}" if near else ""
    return f"{message}{hint}; its linears end in {', '.join(suffixes)}"


def _freeze(model: nn.Module, config: LoRAConfig) -> None:
    layers = list(lora_layers(model))
    adapters = {id(p) for _, layer in layers for p in layer.adapter_parameters().values()}
    for _, layer in trained_layers(model):
        adapters |= {id(p) for p in (*layer.lora_A.values(), *layer.lora_B.values())}
    for name, parameter in model.named_parameters():
        is_bias = name.rpartition(".")[2] == "bias"
        trained = id(parameter) in adapters or (config.bias == "all" and is_bias)
        parameter.requires_grad_(trained)
    if config.bias == "lora_only":
        for _, layer in layers:
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
