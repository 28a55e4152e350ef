"""A model's adapter into its weights and out again, on and off: every layer or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from fastlora.inject import forget, swap
from fastlora.modules import FastLoRALinear, lora_layers
from fastlora.multi_modules import trained_layers
from fastlora.wrapping import unwrapped


def merge_adapter(model: nn.Module) -> nn.Module:
    """Merges every FastLoRALinear in place; ``unmerge_adapter`` undoes it. Returns ``model``.

    Raises RuntimeError when a layer is merged already or shares its weight with another module
    (tied), ValueError when a merged value would not be finite; every layer is as before then.
    """
    layers = _layers(model, merged=False)
    _refuse_tied(unwrapped(model), layers)
    _all_or_none(layers, FastLoRALinear.merge, FastLoRALinear.unmerge)
    return model


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Undoes ``merge_adapter``, bit for bit; returns ``model``.

    Raises RuntimeError when a layer is not merged, or its weight was edited since; every layer is
    as before then.
    """
    _unmerge(_layers(model, merged=True))
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merges for good: plain ``nn.Linear`` layers with the merged weights. Returns ``model``.

    Layers merged before stay so. Errors and their guarantee as in ``merge_adapter``.
    """
    inner = unwrapped(model)
    layers = dict(lora_layers(inner))
    if not layers:
        raise RuntimeError(f"model: expected one with FastLoRALinear layers, found {_found(model)}")
    fresh = {name: layer for name, layer in layers.items() if not layer.merged}
    _refuse_tied(inner, fresh)
    _all_or_none(fresh, FastLoRALinear.merge, FastLoRALinear.unmerge)
    plain = {layer: layer.to_linear() for layer in layers.values()}
    names: dict[nn.Module, list[str]] = {layer: [] for layer in plain}
    for name, module in inner.named_modules(remove_duplicate=False):
        if isinstance(module, FastLoRALinear):
            names[module].append(name)
    for layer, linear in plain.items():
        swap(inner, names[layer], linear)
    forget(inner)
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block ``model`` computes what its base would; merged layers are unmerged in it.

    What was merged is merged again at the end, whatever became of the adapter in between.
    """
    layers, trained = dict(lora_layers(model)), dict(trained_layers(model))
    if not layers and not trained:
        raise RuntimeError("model: expected one with FastLoRALinear layers, found none")
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    remerge = _unmerge(merged)
    before = {layer: layer.adapter_disabled for layer in (*layers.values(), *trained.values())}
    for layer in before:
        layer.adapter_disabled = True
    try:
        yield model
    finally:
        for layer, state in before.items():
            layer.adapter_disabled = state
        _all_or_none(merged, remerge, FastLoRALinear.unmerge)


def _found(model: nn.Module) -> str:
    several = next(trained_layers(model), None) is not None
    return "several adapters in training: save one and load it alone" if several else "none"


def _layers(model: nn.Module, *, merged: bool) -> dict[str, FastLoRALinear]:
    layers = dict(lora_layers(model))
    if not layers:
        raise RuntimeError(f"model: expected one with FastLoRALinear layers, found {_found(model)}")
    wrong = [name for name, layer in layers.items() if layer.merged != merged]
    if wrong:
        state = "not merged" if merged else "merged already"
        raise RuntimeError(
            f"model: {len(wrong)} layers are {state} ({wrong[0]}, …); nothing was changed"
        )
    return layers


def _unmerge(layers: dict[str, FastLoRALinear]) -> Callable[[FastLoRALinear], None]:
    """Unmerges every layer or none; returns what merges a layer again as it was."""
    receipts = {a: receipt for a in layers.values() if (receipt := a._receipt) is not None}

    def remerge(layer: FastLoRALinear) -> None:
        layer.remerge(receipts[layer])

    _all_or_none(layers, FastLoRALinear.unmerge, remerge)
    return remerge


def _all_or_none(
    layers: dict[str, FastLoRALinear],
    step: Callable[[FastLoRALinear], None],
    undo: Callable[[FastLoRALinear], None],
) -> None:
    done: list[FastLoRALinear] = []
    try:
        for name, layer in layers.items():
            try:
                step(layer)
            except (RuntimeError, ValueError) as error:
                kind = ValueError if isinstance(error, ValueError) else RuntimeError
                raise kind(f"{name}: {error}") from error
            done.append(layer)
    except BaseException:
        for layer in reversed(done):
            undo(layer)
        raise


def _refuse_tied(model: nn.Module, layers: dict[str, FastLoRALinear]) -> None:
    """Merging into a weight that another module reads would change that module too."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for kind, parameter in module._parameters.items():
            if parameter is not None and parameter.numel():
                pointer = parameter.untyped_storage().data_ptr()
                owners.setdefault(pointer, []).append((f"{name}.{kind}", module))
    for name, layer in layers.items():
        pointer = layer.weight.untyped_storage().data_ptr()
        others = [owner for owner, module in owners.get(pointer, []) if module is not layer]
        if others:
            raise RuntimeError(
                f"{name}: its weight is tied with {', '.join(others)}, which merging would change "
                "too; exclude the layer or untie the weights first"
            )
