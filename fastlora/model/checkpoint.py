"""Saving and loading a model's adapter, in PEFT's files, both ways."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastlora.adapters import base_copies, files
from fastlora.adapters.base_copies import Copies
from fastlora.adapters.files import Shape
from fastlora.config import LoRAConfig, has_split_base, matching
from fastlora.config.listing import list_some
from fastlora.functional.receipt import Adapter
from fastlora.inspection.layers import get_matrix
from fastlora.inspection.wrappers import strip_wrappers, unwrap
from fastlora.model.replace import inject
from fastlora.model.report import (
    Injection,
    carries,
    injection,
    missing,
    remember,
    report,
    saved,
    training_rows,
)
from fastlora.model.targets import Plan, plan
from fastlora.modules import dtensors, saved_modules
from fastlora.modules.layer import LoRALayer, find_lora_layers
from fastlora.modules.saved_modules import SavedModule
from fastlora.modules.trained import TrainableMultiLoRALinear, find_trained_layers

# PEFT's name of each adapter parameter.
_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}


def adapter_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """The adapter's tensors, biases and whole modules it trains, under PEFT's names, not copied.

    adapter_name: which, where the model trains several. Of a sharded model (``fully_shard``, tensor
    parallelism) they are DTensors. Raises ValueError for a name it does not have, RuntimeError when
    the model has no FastLoRALinear, its adapter is merged or in flat parts (FSDP1, ZeRO).
    """
    tensors = _tensors(model, adapter_name)
    return {files.PREFIX + name: tensor for name, tensor in tensors.items()}


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter_name: str | None = None
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT reads too.

    adapter_name: which, where the model trains several. Of a sharded model (``fully_shard``, tensor
    parallelism) every process must call: the tensors are gathered, the process of rank 0 writes,
    and the others return when it has. Embeddings into which ``load_adapter`` has put rows of an
    adapter's are saved along. Raises RuntimeError when the model has no adapter, or it is
    merged or in flat parts (FSDP1, ZeRO), ValueError for a bad directory or a name the model does
    not have.
    """
    dtensors.reshard(model)
    tensors = _tensors(model, adapter_name)
    settings = injection(model).config
    base = settings.base_model_name_or_path or getattr(
        getattr(unwrap(model), "config", None), "name_or_path", None
    )
    layers = list(_layers(model))
    values = settings.to_dict() | {"base_model_name_or_path": base or None}
    # PEFT's word for all layers is how the last of them lies.
    values["fan_in_fan_out"] = layers[-1][1].fan_in_fan_out
    if settings.all_linear:
        # As PEFT does: the file names the layers, so that it means the same to every reader.
        names, own = [name for name, _ in layers], {layer for _, layer in layers}
        modules = unwrap(model).named_modules(remove_duplicate=False)
        others = {strip_wrappers(name) for name, module in modules if module not in own} - {*names}
        values["target_modules"] = matching.name_exactly(names, others)
    with dtensors.gather(tensors) as whole:
        if whole is not None:
            files.write(directory, LoRAConfig.from_dict(values), whole)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    adapter_name: str | None = None,
) -> nn.Module:
    """Loads an adapter that fastlora or PEFT saved into ``model``, in place; returns ``model``.

    Replaces the linears that the adapter's config names, or, where the model has FastLoRALinear
    layers already, fills exactly those and takes the file's settings. is_trainable=False freezes
    the adapter. adapter_name: which one to fill, where the model trains several; what its layers
    are set to must then be the file's settings. Of a sharded model every process must call: each
    reads the files and keeps its part. Warns where keys of alpha_pattern overlap in the order of
    the alphabet, which is PEFT's and not the one that counted. Embeddings that PEFT has saved along
    are the base's, or rows that came with the adapter: those are put into the model's, as PEFT
    does, with a UserWarning where they are not the last ones, as a resized vocabulary's are.

    Raises ValueError, the model unchanged, for an unsupported config, missing, unexpected or
    wrongly shaped tensors, ranks that disagree, truncated or oversized files and pickles, another
    vocabulary (the error names the call that resizes) or the frozen weights of another base;
    FileNotFoundError for a missing file; RuntimeError for a merged model, or flat parts of one
    (FSDP1, ZeRO).
    """
    dtensors.reshard(model)
    if adapter_name is not None:
        config = files.read_config(directory, is_trainable)
        return _load_one(model, directory, config, adapter_name, is_trainable)
    if next(find_trained_layers(unwrap(model)), None):
        raise ValueError("adapter_name: expected which of the model's adapters to fill, got None")
    read_adapter(model, directory, trainable=is_trainable).fill(model, is_trainable)
    return model


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter read from files and found to fit a model, which it has not changed yet."""

    config: LoRAConfig
    chosen: Plan | None  # the linears to replace, where the model has no LoRA layers yet
    tensors: dict[str, Tensor]
    biases: dict[str, nn.Parameter]
    copies: Copies

    def adapter_of(self, name: str, layer: LoRALayer) -> Adapter:
        """(lora_A, lora_B, scaling) as ``layer``, of that name, will hold them."""
        A, B = (self.tensors[f"{name}.{_KEYS[kind]}"] for kind in ("lora_A", "lora_B"))
        return A.to(layer.lora_A), B.to(layer.lora_B), self.config.scaling_of(name)

    def fill(self, model: nn.Module, is_trainable: bool = False) -> None:
        """Puts it into the model."""
        self.copies.warn(stacklevel=3)
        _apply(model, self, is_trainable)


def read_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    merged: bool = False,
    trainable: bool = False,
) -> LoadedAdapter:
    """The adapter in ``directory`` for ``model``; merged: for one whose layers are."""
    config, inner = files.read_config(directory, trainable), unwrap(model)
    existing = dict(find_lora_layers(inner))
    chosen = None
    if existing:
        _check_existing(existing, config, merged)
        weights = {name: layer.matrix for name, layer in existing.items()}
    else:
        chosen = plan(inner, config)
        weights = {
            strip_wrappers(n): get_matrix(linear) for n, (linear, _) in chosen.linears.items()
        }
    expected = {
        key: shape
        for name, weight in weights.items()
        for key, shape in adapter_shapes(name, weight.shape, config).items()
    }
    trained = _saved(inner, config, chosen)
    whole = saved_modules.list_tensors(trained, config)
    biases = _biases(inner, config, set(weights))
    biases = {key: bias for key, bias in biases.items() if key not in whole}
    expected |= {key: tuple(t.shape) for key, t in (biases | whole).items()}
    moved = has_split_base(config.init_lora_weights)
    fixed = "which is not swapped: unmerge_adapter, load_adapter and merge_adapter"
    copies = base_copies.read(
        directory, inner, weights, expected, trained, moved, merged, fixed if merged else None
    )
    tensors = files.read_tensors(directory, expected, copies.names)
    return LoadedAdapter(config, chosen, tensors, biases, copies)


def adapter_shapes(name: str, base: Sequence[int], config: LoRAConfig) -> dict[str, Shape]:
    """{tensor name: shape} of an adapter for linear ``name`` of (N, K): A, B, and a bias if any."""
    (N, K), r = base, config.rank_of(name)
    shapes: dict[str, Shape] = {
        f"{name}.{_KEYS['lora_A']}": (r, K),
        f"{name}.{_KEYS['lora_B']}": (N, r),
    }
    if config.lora_bias:
        shapes[f"{name}.{_KEYS['lora_bias']}"] = (N,)
    return shapes


def _load_one(
    model: nn.Module,
    directory: str | os.PathLike[str],
    config: LoRAConfig,
    adapter_name: str,
    is_trainable: bool,
) -> nn.Module:
    """Fills one of the adapters that ``model`` trains side by side."""
    layers = dict(find_trained_layers(model))
    training_rows(model).index(adapter_name)
    config.check_plain("of adapters trained together none")
    expected = {}
    for name, layer in layers.items():
        _check_named(name, layer.r, config)
        if layer.scaling != config.scaling_of(name):
            raise ValueError(
                f"{name}: the layer scales by {layer.scaling:g}, the adapter by "
                f"{config.scaling_of(name):g}"
            )
        expected |= adapter_shapes(name, layer.matrix.shape, config)
    fixed = "and the base is that of all adapters: load it alone, into a model without the others"
    copies = base_copies.read(directory, model, layers, expected, fixed=fixed)
    tensors = files.read_tensors(directory, expected, copies.names)
    with torch.no_grad():
        for name, layer in layers.items():
            for kind, parameter in layer.adapter_parameters(adapter_name).items():
                dtensors.copy_whole(parameter, tensors[f"{name}.{_KEYS[kind]}"])
                parameter.requires_grad_(is_trainable)
    return model


def _layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer | TrainableMultiLoRALinear]]:
    yield from find_lora_layers(model)
    yield from find_trained_layers(model)


def _tensors(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    layers, trained = dict(find_lora_layers(model)), dict(find_trained_layers(model))
    if trained or adapter_name is not None:
        training_rows(model).index(adapter_name)
        for name, layer in trained.items():
            parameters = layer.adapter_parameters(str(adapter_name))
            dtensors.check_whole(name, layer, layer.r, parameters)
        return {
            f"{name}.{_KEYS[kind]}": parameter
            for name, layer in trained.items()
            for kind, parameter in layer.adapter_parameters(str(adapter_name)).items()
        }
    if not layers:
        raise missing(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"model: {len(merged)} layers are merged ({merged[0]}, …): unmerge_adapter first, or "
            "save the whole model after merge_and_unload"
        )
    for name, layer in layers.items():
        dtensors.check_whole(name, layer, layer.r, layer.adapter_parameters())
    tensors: dict[str, Tensor] = {
        f"{name}.{_KEYS[kind]}": parameter
        for name, layer in layers.items()
        for kind, parameter in layer.adapter_parameters().items()
    }
    inner, config = unwrap(model), injection(model).config
    whole = saved_modules.list_tensors(saved(inner), config)
    bases = base_copies.held(inner, layers, saved(inner))
    tensors |= {name: bases[name] for name in sorted(carries(inner)) if name in bases}
    return tensors | _biases(inner, config, set(layers)) | whole


def _biases(model: nn.Module, config: LoRAConfig, replaced: set[str]) -> dict[str, nn.Parameter]:
    """{PEFT's name: parameter} of the base's biases that belong to the adapter."""
    found = {}
    if config.bias == "none":
        return found
    # PEFT's files name a bias that is tied with another twice.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, last = strip_wrappers(name).rpartition(".")
        if last != "bias":
            continue
        if owner in replaced:
            found[f"{owner}.base_layer.{last}"] = parameter
        elif config.bias == "all":
            found[strip_wrappers(name)] = parameter
    return found


def _saved(model: nn.Module, config: LoRAConfig, chosen: Plan | None) -> dict[str, SavedModule]:
    """By name, what the adapter trains whole, if it has not been copied yet as its own copy."""
    if chosen is not None:
        return {name: SavedModule(module, module) for name, module in chosen.saved.items()}
    found, there = saved_modules.find(model, config), saved(model)
    if found.keys() != there.keys():
        raise ValueError(
            f"modules_to_save: the model trains {list_some(there) or 'nothing'} whole, the adapter "
            f"{list_some(found) or 'nothing'}"
        )
    return there


def _check_existing(layers: dict[str, LoRALayer], config: LoRAConfig, merged: bool) -> None:
    for name, layer in layers.items():
        if layer.merged and not merged:
            raise RuntimeError(
                f"{name} is merged: unmerge_adapter before loading another adapter, or swap_adapter"
            )
        _check_named(name, layer.r, config)
        dtensors.check_whole(
            name, layer, layer.r, {"weight": layer.weight, **layer.adapter_parameters()}
        )
        if (layer.lora_bias is not None) != config.lora_bias:
            raise ValueError(f"{name}: lora_bias: the layer and the adapter's config disagree")
        own, wanted = layer.init_lora_weights, config.init_lora_weights
        alike = own == wanted and layer.scaling == config.scaling_of(name)
        if (has_split_base(own) or has_split_base(wanted)) and not alike:
            raise ValueError(
                f"{name}: init_lora_weights: the adapter is for what {wanted!r} leaves of the base "
                f"at a scaling of {config.scaling_of(name):g}, the layer has what {own!r} leaves "
                f"at {layer.scaling:g}: load it into the base itself"
            )


def _check_named(name: str, r: int, config: LoRAConfig) -> None:
    if not config.names(name):
        raise ValueError(f"{name}: the layer has LoRA, the adapter's config does not name it")
    if r != config.rank_of(name):
        raise ValueError(f"{name}: the layer has r={r}, the adapter r={config.rank_of(name)}")


def _apply(model: nn.Module, loaded: LoadedAdapter, is_trainable: bool) -> None:
    config, tensors, biases = loaded.config, loaded.tensors, loaded.biases
    # What an earlier adapter has put into the base is in it still.
    carried = carries(model) | loaded.copies.changes.keys()
    if loaded.chosen is not None:
        inject(model, config, loaded.chosen)
        remember(model, replace(injection(model), carried=carried))
    else:
        before = report(model).skipped
        remember(model, Injection(config, before, saved=saved(model), carried=carried))
    loaded.copies.fill()
    with torch.no_grad():
        for key, bias in biases.items():
            dtensors.copy_whole(bias, tensors[key])
        for name, layer in find_lora_layers(model):
            layer.lora_alpha, layer.use_rslora = config.alpha_of(name), config.use_rslora
            layer.scaling, layer.lora_dropout = config.scaling_of(name), config.lora_dropout
            for kind, parameter in layer.adapter_parameters().items():
                dtensors.copy_whole(parameter, tensors[f"{name}.{_KEYS[kind]}"])
                parameter.requires_grad_(is_trainable)
        for name, module in saved(model).items():
            module.trained.requires_grad_(is_trainable)
            for key, tensor in saved_modules.list_state(name, module.trained).items():
                dtensors.copy_whole(tensor, tensors[key])
    for bias in biases.values():
        bias.requires_grad_(is_trainable)
