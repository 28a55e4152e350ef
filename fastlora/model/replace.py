"""LoRA put into a whole model, in the place of its linears."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastlora.adapters.files import check_name
from fastlora.backends.merge_lists.undo import all_or_none
from fastlora.config import LoRAConfig, has_split_base
from fastlora.config.listing import list_some
from fastlora.inspection import first_forward
from fastlora.inspection.layers import is_conv1d
from fastlora.inspection.wrappers import unwrap
from fastlora.model.heads import explain_unsaved_head
from fastlora.model.record import Injection, forget, remember
from fastlora.model.targets import Plan, find_unused_names, make_plan
from fastlora.model.tied import find_tied
from fastlora.modules import init as initial
from fastlora.modules import saved_modules
from fastlora.modules.conv1d import FastLoRAConv1D
from fastlora.modules.layer import find_lora_layers
from fastlora.modules.linear import FastLoRALinear
from fastlora.modules.replacement import replace_module
from fastlora.modules.trained import TrainableMultiLoRALinear, find_trained_layers
from fastlora.modules.training_rows import TrainingRows
from fastlora.rows.watch import Watch


def replace_linear(
    model: nn.Module,
    config: object,
    *,
    freeze_base: bool = True,
    adapter_names: Sequence[str] | None = None,
) -> nn.Module:
    """Replaces in place the linears that ``config`` names by ``FastLoRALinear``; returns ``model``.

    - config: ``LoRAConfig`` or ``peft.LoraConfig``
    - freeze_base: everything but the adapters, and the biases that ``config.bias`` asks for, stops
      requiring gradients
    - adapter_names: several adapters on the one base instead, trained together: ``use_adapters``
      names each row's adapter, ``save_adapter(..., adapter_name=)`` saves one

    transformers' ``Conv1D`` becomes ``FastLoRAConv1D``. Modules that modules_to_save names, and the
    head that PEFT adds for task_type, are replaced by copies that train. Where init_lora_weights
    splits the weights, they change; until all are ready, they take their memory twice.
    ``report(model)`` says what was replaced, what was skipped and why.

    Raises ValueError, the model unchanged, when nothing matches (near names are listed), when a
    layer that was named cannot be replaced, and when the model has LoRA layers already, PEFT's
    among them; for several adapters also when ``config`` asks for biases, whole modules or split
    weights, which belong to no single one. Warns where a name in target_modules, rank_pattern or
    alpha_pattern is no layer's, as a mistyped one, and where no layer lies as fan_in_fan_out says:
    each layer's own kind decides.
    """
    original = LoRAConfig.of(config)
    model, settings = _check_model(model), original.with_heads()
    rows = None if adapter_names is None else _make_training_rows(adapter_names, original)
    chosen = make_plan(model, settings)
    if rows is not None and chosen.saved:
        raise ValueError(
            "modules_to_save: of adapters trained together none trains modules whole, got "
            f"{list_some(chosen.saved)} (task_type={original.task_type!r})"
        )
    saved_modules.check_names(settings, chosen.saved)
    adapted = [name for name, _ in (*find_lora_layers(model), *find_trained_layers(model))]
    if adapted:
        raise ValueError(
            f"model: {len(adapted)} layers have LoRA already ({adapted[0]}, …) and one config must "
            "speak for all: name all layers at once, rank_pattern and alpha_pattern tell them apart"
        )
    inject(model, settings, chosen, rows, freeze_base)
    if unused := find_unused_names(settings, chosen):
        warnings.warn("; ".join(unused), stacklevel=2)
    if unsaved := explain_unsaved_head(unwrap(model), settings, chosen):
        warnings.warn(unsaved, stacklevel=2)
    for name, places in chosen.elsewhere.items():
        warnings.warn(
            f"{name}: the same layer is also at {list_some(places)}, and has its adapter at {name} "
            "alone, as in PEFT: exclude it, or give each place a layer of its own, to mean another",
            stacklevel=2,
        )
    orientations = {is_conv1d(linear) for linear, _ in chosen.linears.values()}
    if original.fan_in_fan_out not in orientations:
        warnings.warn(
            f"fan_in_fan_out={original.fan_in_fan_out} holds for none of the layers that were "
            f"replaced ({next(iter(chosen.linears))}, …): taken as {not original.fan_in_fan_out}",
            stacklevel=2,
        )
    return model


def inject(
    model: nn.Module,
    config: LoRAConfig,
    chosen: Plan,
    rows: TrainingRows | None = None,
    freeze_base: bool = True,
) -> None:
    """Does what was ``chosen``, all of it or, on an error, nothing."""
    inner = unwrap(model)
    layers = {
        name: _make_layer(name, linear, config, rows)
        for name, (linear, _) in chosen.linears.items()
    }
    saved = saved_modules.copy_modules(chosen.saved)
    with all_or_none() as undo:
        if has_split_base(config.init_lora_weights):
            _refuse_tied(inner, chosen, config)
            initial.split_bases(layers, str(config.init_lora_weights), undo)
        for name, (linear, names) in chosen.linears.items():
            undo.push(replace_module, inner, names, linear)
            replace_module(inner, names, layers[name])
        for name, module in saved.items():
            undo.push(replace_module, inner, [name], module.original)
            replace_module(inner, [name], module.trained)
        undo.push(forget, inner)
        watch = None if rows is None else Watch(inner, rows, layers.values())
        remember(inner, Injection(config, chosen.skipped, rows, saved, watch=watch))
    if freeze_base:
        _freeze(inner, config, saved)
    first_forward.watch(inner)


def _make_training_rows(adapter_names: Sequence[str], config: LoRAConfig) -> TrainingRows:
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names: expected a list of names, got {adapter_names!r}")
    names = [check_name(name) for name in adapter_names]
    if not names or len(set(names)) < len(names) or "__base__" in names:
        raise ValueError(f'adapter_names: expected different names, none "__base__", got {names!r}')
    config.check_plain("of adapters trained together none")
    return TrainingRows(names)


def _make_layer(name: str, linear: nn.Module, config: LoRAConfig, rows: TrainingRows | None) -> Any:
    options = {
        "lora_alpha": config.alpha_of(name),
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "init_lora_weights": config.init_lora_weights,
    }
    r = config.rank_of(name)
    if rows is not None:
        return TrainableMultiLoRALinear.from_linear(linear, rows, r, **options)
    kind = FastLoRAConv1D if is_conv1d(linear) else FastLoRALinear
    return kind._share(linear, r, lora_bias=config.lora_bias, **options)


def _refuse_tied(model: nn.Module, chosen: Plan, config: LoRAConfig) -> None:
    """Raises ValueError where a weight that is to be split is another module's too."""
    names_of_tied = find_tied(model, [linear for linear, _ in chosen.linears.values()])
    for name, (linear, _) in chosen.linears.items():
        if linear in names_of_tied:
            raise ValueError(
                f"{name}: its weight is tied with {list_some(names_of_tied[linear])}, which "
                f"init_lora_weights={config.init_lora_weights!r} would change too: exclude the "
                "layer, or untie it first"
            )


def _check_model(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(unwrap(model), nn.Linear):
        raise ValueError(
            "model: expected a module that contains linears, got a linear itself: use "
            "FastLoRALinear.from_linear"
        )
    return model


def _freeze(
    model: nn.Module,
    config: LoRAConfig,
    saved: Mapping[str, saved_modules.SavedModule],
) -> None:
    layers = list(find_lora_layers(model))
    adapters = {id(p) for _, layer in layers for p in layer.adapter_parameters().values()}
    for _, layer in find_trained_layers(model):
        adapters |= {id(p) for p in (*layer.lora_A.values(), *layer.lora_B.values())}
    for module in saved.values():
        adapters |= {id(p) for p in module.trained.parameters()}
        module.original.requires_grad_(False)
    for name, parameter in model.named_parameters():
        is_bias = name.rpartition(".")[2] == "bias"
        trained = id(parameter) in adapters or (config.bias == "all" and is_bias)
        parameter.requires_grad_(trained)
    if config.bias == "lora_only":
        for _, layer in layers:
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
