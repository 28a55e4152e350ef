"""A PEFT model on fastlora's kernels: its LoRA linears get another class, and PEFT's back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft.tuners.lora import layer as lora
from torch import nn

from fastlora.injection import Report, by_reason, report
from fastlora.integrations import peft_rows
from fastlora.integrations.peft_linear import Linear
from fastlora.integrations.peft_parts import obstacle, product
from fastlora.integrations.peft_quantized import QUANTIZED
from fastlora.targets import bypassed
from fastlora.wrapping import unwrapped

# {PEFT's class: ours}
PATCHED: dict[type[nn.Module], type[nn.Module]] = {lora.Linear: Linear, **QUANTIZED}
OURS = {ours: theirs for theirs, ours in PATCHED.items()}


class LoraModel(peft.LoraModel):
    """``peft.LoraModel`` whose new layers are patched as they come, and whose rows are followed."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        error: BaseException | None = None
        # PEFT's names stay in the layers, for later batches, if an error passes through this.
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            try:
                if names is None:
                    yield
                else:
                    with peft_rows.named(self, names, args, kwargs):
                        yield
            except BaseException as raised:
                error = raised
        if error is not None:
            raise error

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        super()._replace_module(parent, child_name, new_module, child)
        if isinstance(new_module, lora.LoraLayer) and _left_alone(new_module) is None:
            _patch_layer(new_module)


def patch(model: nn.Module, strict: bool) -> Report:
    """``fastlora.patch_peft``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"peft_model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(
            "peft_model: expected a model with LoRA layers of PEFT's, found none in "
            f"{type(unwrapped(model)).__name__}: patch what peft.get_peft_model returns (a model "
            "of fastlora.replace_linear needs no patch)"
        )
    reasons = _reasons(model, layers)
    if len(reasons) == len(layers) or (strict and reasons):
        raise ValueError(
            f"peft_model: {len(reasons)} of {len(layers)} LoRA layers cannot be patched: "
            f"{'; '.join(by_reason(reasons))}; the model is as it was, and PEFT computes it"
        )
    for name, layer in layers.items():
        if name not in reasons:
            _patch_layer(layer)
    for module in unwrapped(model).modules():
        if type(module) is peft.LoraModel:
            module.__class__ = LoraModel
            peft_rows.watch(module)
    _warn_of_virtual_tokens(unwrapped(model))
    return report(model)


def unpatch(model: nn.Module) -> None:
    """``fastlora.unpatch_peft``."""
    back = OURS | {LoraModel: peft.LoraModel}
    modules = [module for module in unwrapped(model).modules() if type(module) in back]
    if not modules:
        raise ValueError(
            f"peft_model: expected one that patch_peft has patched, got {type(model).__name__}"
        )
    for module in modules:
        vars(module).pop("_receipts", None)
        peft_rows.unwatch(module)
        module.__class__ = back[type(module)]


def describe(model: nn.Module) -> dict[str, Any]:
    """What ``fastlora.report`` says of PEFT's layers, where some are patched."""
    layers = _lora_layers(model)
    patched = {name: layer for name, layer in layers.items() if type(layer) in OURS}
    if not patched:
        return {}
    new = [name for name in layers if name not in patched]
    skipped = dict.fromkeys(new, "not patched: call patch_peft again")
    skipped |= _reasons(model, layers)
    bases = {name: product(layer.base_layer) for name, layer in patched.items()}
    return {
        "replaced": {
            name: max(layer.r.values(), default=0)
            for name, layer in patched.items()
            if name not in skipped
        },
        "skipped": skipped,
        "around": {
            name: base
            for name, base in bases.items()
            if isinstance(base, str) and name not in skipped
        },
        "merged": tuple(name for name, layer in patched.items() if layer.merged),
    }


def _warn_of_virtual_tokens(model: nn.Module) -> None:
    """Of prompt learning around the layers, beside a transformers that wants a newer PEFT.

    5.24 calls a forward's earlier keys and values ``cache``, and PEFT 0.21 looks for
    ``past_key_values``: ``generate`` writes other texts, without an error.
    """
    settings: list[Any] = (
        list(model.peft_config.values()) if isinstance(model, peft.PeftModel) else []
    )
    kinds = [each.peft_type.value for each in settings if each.is_prompt_learning]
    if not kinds:
        return
    import transformers
    from transformers.integrations import peft as theirs
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(min_version=theirs.MIN_PEFT_VERSION)
    except ValueError as error:
        warnings.warn(
            f"peft_model: generate of transformers {transformers.__version__} may get wrong its "
            f"{kinds[0]} of PEFT {peft.__version__}: {error}; "
            "the LoRA layers are patched all the same",
            stacklevel=4,
        )


def _patch_layer(layer: nn.Module) -> None:
    if type(layer) in PATCHED:
        layer.__class__ = PATCHED[type(layer)]


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    modules = unwrapped(model).named_modules()
    return {name: module for name, module in modules if isinstance(module, lora.LoraLayer)}


def _reasons(model: nn.Module, layers: dict[str, Any]) -> dict[str, str]:
    """{layer: why PEFT computes it}, of those that it does compute."""
    found = {
        name: bypassed(unwrapped(model), [name]) or _left_alone(layer)
        for name, layer in layers.items()
    }
    return {name: reason for name, reason in found.items() if reason is not None}


def _left_alone(layer: Any) -> str | None:
    kind = type(layer)
    if kind not in PATCHED and kind not in OURS:
        return f"it is a {kind.__module__}.{kind.__qualname__}, not a peft.tuners.lora.Linear"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    # Those that are active now; others are looked at when their turn comes.
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return obstacle(layer, active or list(layer.lora_A))
