"""A model's adapter into its weights and out again, on and off: every layer or none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.undo import Undo, all_or_none
from fastlora.config.listing import list_some
from fastlora.functional import merge_groups
from fastlora.functional.fidelity import LOW_GAIN, FidelityWarning
from fastlora.functional.receipt import Adapter, MergeReceipt
from fastlora.inspection import first_forward
from fastlora.inspection.wrappers import unwrap
from fastlora.model import tied
from fastlora.model.load import read_adapter
from fastlora.model.record import forget, get_saved_modules, make_missing_error
from fastlora.modules.layer import LoRALayer, find_lora_layers
from fastlora.modules.replacement import replace_module
from fastlora.modules.trained import find_trained_layers

_SETTINGS = ("lora_alpha", "use_rslora", "scaling", "lora_dropout", "_fidelity")


def merge_adapter(model: nn.Module, *, untie: bool = False, snapshot: bool = False) -> nn.Module:
    """Merges every FastLoRALinear in place; ``unmerge_adapter`` undoes it. Returns ``model``.

    - untie: a layer whose weight another module reads too (tied) gets a copy of its own, and keeps
      it when it is unmerged; ``report(model).untied`` names them
    - snapshot: keeps copies of the weights, good on any machine and in any version, not receipts

    ``report(model).fidelity`` says how much of the adapter has arrived in each layer; below a gain
    of 0.9 a ``FidelityWarning`` says so too.

    Raises RuntimeError when a layer is merged already, tied, or read by a module that never calls
    it; TypeError or ValueError when one is sharded or quantized; ValueError when a merged value
    would not be finite. Every byte of the model is as before then, and after an interruption.
    """
    with all_or_none() as undo:
        _merge(model, _layers(model, merged=False), untie, snapshot, undo)
    return model


def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Undoes ``merge_adapter``, bit for bit; returns ``model``.

    Raises RuntimeError when a layer is not merged, or its weight was edited since; every layer is
    as before then.
    """
    _unmerge(_layers(model, merged=True))
    return model


def merge_and_unload(model: nn.Module, *, untie: bool = False) -> nn.Module:
    """Merges for good: plain ``nn.Linear`` (``Conv1D``) layers with the merged weights.

    Returns ``model``. What was trained whole (modules_to_save) stays in its place. Layers merged
    before stay so, once they were seen to be what their merge left. untie, errors and their
    guarantee as in ``merge_adapter``.
    """
    inner = unwrap(model)
    layers = dict(find_lora_layers(inner))
    if not layers:
        raise make_missing_error(model)
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    fresh = {name: layer for name, layer in layers.items() if not layer.merged}
    names: dict[nn.Module, list[str]] = {layer: [] for layer in layers.values()}
    for name, module in inner.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALayer):
            names[module].append(name)
    with all_or_none() as undo:
        # An edited weight would be taken for the merged one: unmerging refuses it.
        _remerge(merged, _unmerge(merged))
        _merge(model, fresh, untie, False, undo)
        plain = {layer: layer.to_linear() for layer in layers.values()}
        for layer, linear in plain.items():
            undo.push(replace_module, inner, names[layer], layer)
            replace_module(inner, names[layer], linear)
        if get_saved_modules(inner):
            tied.note_untied(inner, undo)
        forget(inner)
    first_forward.unwatch_all(inner)
    return model


def swap_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Of a merged model: the adapter in ``directory`` instead of the one that is merged.

    For adapters that train no modules whole (modules_to_save). The weights have the bits of
    unmerging, loading and merging. The layers' own tensors are the new adapter's afterwards, so
    that ``unmerge_adapter`` gives the base back and leaves it loaded. Its ranks and layers must be
    those of the model (else: unmerge, load_adapter, merge_adapter). Returns ``model``; errors as in
    ``load_adapter`` and ``merge_adapter``, every byte as before.
    """
    layers = _layers(model, merged=True)
    if get_saved_modules(model):
        raise ValueError(
            f"modules_to_save: the adapter trains {list_some(get_saved_modules(model))} whole, "
            "which is not swapped: unmerge_adapter, load_adapter and merge_adapter"
        )
    loaded = read_adapter(model, directory, merged=True)
    adapters = [loaded.adapter_of(name, layer) for name, layer in layers.items()]
    with all_or_none() as undo, errors.named(list(layers)):
        receipts = [layer.needed_receipt() for layer in layers.values()]
        old = [receipt.adapters for receipt in receipts]
        weights = [layer.matrix for layer in layers.values()]
        samples = [layer.sampled() for layer in layers.values()]
        fresh = merge_groups.swap(weights, receipts, [[adapter] for adapter in adapters])
        undo.push(_swap_back, layers, weights, fresh, old)
        _set_receipts(layers, fresh)
        for layer in layers.values():
            _note_adapter(layer, undo)
        loaded.fill(model)
        for layer, sample, adapter in zip(layers.values(), samples, adapters, strict=True):
            layer.measure(sample, adapter)
        _warn(layers, stacklevel=3)
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block ``model`` computes what its base would; merged layers are unmerged in it.

    Modules that are trained whole are the original ones in it. A base whose weights were split
    (init_lora_weights "pissa", "olora") stays what that left. What was merged is merged again at
    the end, whatever became of the adapter in between.
    """
    layers, trained = dict(find_lora_layers(model)), dict(find_trained_layers(model))
    if not layers and not trained:
        raise make_missing_error(model)
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    receipts = _unmerge(merged)
    before = {layer: layer.adapter_disabled for layer in (*layers.values(), *trained.values())}
    try:
        for layer in before:
            layer.adapter_disabled = True
        with _originals_in_place(unwrap(model)):
            yield model
    finally:
        for layer, state in before.items():
            layer.adapter_disabled = state
        _remerge(merged, receipts)


@contextmanager
def _originals_in_place(model: nn.Module) -> Iterator[None]:
    there = {name: model.get_submodule(name) for name in get_saved_modules(model)}
    try:
        for name, module in get_saved_modules(model).items():
            replace_module(model, [name], module.match_copy())
        yield
    finally:
        for name, module in there.items():
            replace_module(model, [name], module)


def _layers(model: nn.Module, *, merged: bool) -> dict[str, LoRALayer]:
    layers = dict(find_lora_layers(model))
    if not layers:
        raise make_missing_error(model)
    wrong = [name for name, layer in layers.items() if layer.merged != merged]
    if wrong:
        state = "not merged" if merged else "merged already"
        raise RuntimeError(
            f"model: {len(wrong)} layers are {state} ({wrong[0]}, …); nothing was changed"
        )
    return layers


def _merge(
    model: nn.Module, layers: dict[str, LoRALayer], untie: bool, snapshot: bool, undo: Undo
) -> None:
    inner = unwrap(model)
    for name, layer in layers.items():
        with errors.named([name]):
            layer.check_mergeable()
    adding = {n: e for n, e in layers.items() if e.lora_bias is not None or e.lora_B.any()}
    first_forward.refuse_idle(inner, adding)
    if untie:
        tied.untie(inner, layers, undo)
    else:
        tied.refuse_tied(inner, layers)
    with errors.named(list(layers)):
        samples = [layer.sampled() for layer in layers.values()]
        adapters = [layer.adapter for layer in layers.values()]
        weights = [layer.matrix for layer in layers.values()]
        receipts = merge_groups.merge(weights, [[a] for a in adapters], True, snapshot)
        undo.push(_take_out, layers, weights, receipts)
        _set_receipts(layers, receipts)
        for layer, sample, adapter in zip(layers.values(), samples, adapters, strict=True):
            layer.measure(sample, adapter)
        # In here: where warnings are errors this one takes the merge back.
        _warn(layers, stacklevel=4)


def _unmerge(layers: dict[str, LoRALayer]) -> list[MergeReceipt]:
    """Unmerges every layer or none; returns what says how each was merged."""
    receipts = []
    for name, layer in layers.items():
        with errors.named([name]):
            receipts.append(layer.needed_receipt())
    with all_or_none() as undo, errors.named(list(layers)):
        merge_groups.unmerge([layer.matrix for layer in layers.values()], receipts)
        undo.push(_remerge, layers, receipts)
        _set_receipts(layers, [None] * len(receipts))
    return receipts


def _remerge(layers: dict[str, LoRALayer], receipts: Sequence[MergeReceipt]) -> None:
    """Merges what the receipts say was merged once, whatever the adapters are by now.

    An interrupt is heard when all is merged: who asked for this wants the layers as they were.
    """
    try:
        _remerge_once(layers, receipts)
    except BaseException:
        _remerge_once(layers, receipts)
        raise


def _remerge_once(layers: dict[str, LoRALayer], receipts: Sequence[MergeReceipt]) -> None:
    with all_or_none() as undo, errors.named(list(layers)):
        weights = [layer.matrix for layer in layers.values()]
        fresh = merge_groups.remerge(weights, receipts)
        undo.push(_take_out, layers, weights, fresh)
        _set_receipts(layers, fresh)


def _take_out(
    layers: dict[str, LoRALayer], weights: list[Tensor], receipts: list[MergeReceipt]
) -> None:
    merge_groups.unmerge(weights, receipts)
    _set_receipts(layers, [None] * len(receipts))


def _swap_back(
    layers: dict[str, LoRALayer],
    weights: list[Tensor],
    receipts: list[MergeReceipt],
    adapters: list[tuple[Adapter, ...]],
) -> None:
    _set_receipts(layers, merge_groups.swap(weights, receipts, adapters))


def _set_receipts(layers: dict[str, LoRALayer], receipts: Sequence[MergeReceipt | None]) -> None:
    for layer, receipt in zip(layers.values(), receipts, strict=True):
        layer._receipt = receipt


def _note_adapter(layer: LoRALayer, undo: Undo) -> None:
    """Has ``undo`` give ``layer`` its adapter and settings back, its weight left alone."""
    undo.push(vars(layer).update, {name: getattr(layer, name) for name in _SETTINGS})
    for parameter in layer.adapter_parameters().values():
        undo.push(_give_back, parameter, parameter.detach().clone(), parameter.requires_grad)


@torch.no_grad()
def _give_back(parameter: nn.Parameter, values: Tensor, requires_grad: bool) -> None:
    parameter.copy_(values).requires_grad_(requires_grad)


def _warn(layers: dict[str, LoRALayer], stacklevel: int) -> None:
    low = {n: layer.fidelity.gain for n, layer in layers.items() if layer.fidelity is not None}
    low = {name: gain for name, gain in low.items() if gain < LOW_GAIN}
    if low:
        worst = min(low, key=low.__getitem__)
        warnings.warn(
            f"rounding has lost part of the adapter in {len(low)} of {len(layers)} merged layers: "
            f"{worst} has {low[worst]:.0%} of it, report(model).fidelity has all; merge into a "
            "wider dtype, or keep the adapter unmerged",
            FidelityWarning,
            stacklevel=stacklevel,
        )
