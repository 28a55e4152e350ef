"""PEFT models on fastlora's kernels: their LoRA linears get another class, and PEFT's back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft.tuners.lora import layer as lora
from torch import nn

from fastlora.config.listing import group_by_reason, list_some
from fastlora.inspection import first_forward
from fastlora.inspection.bypass import explain_bypass
from fastlora.inspection.wrappers import unwrap
from fastlora.integrations.peft import bypassed
from fastlora.integrations.peft import rows as peft_rows
from fastlora.integrations.peft import tied as peft_tied
from fastlora.integrations.peft.linear import Linear
from fastlora.integrations.peft.merging import warn_of_lost_merges
from fastlora.integrations.peft.packing import keep_unpacked, let_pack
from fastlora.integrations.peft.parts import explain_obstacle, read_product
from fastlora.integrations.peft.quantized import QUANTIZED
from fastlora.integrations.peft.running import list_misstated, read_rank, warn_before_saving
from fastlora.model.report import Report, report

# {PEFT's class: ours}
PATCHED: dict[type[nn.Module], type[nn.Module]] = {lora.Linear: Linear, **QUANTIZED}
OURS = {ours: theirs for theirs, ours in PATCHED.items()}


class LoraModel(peft.LoraModel):
    """``peft.LoraModel`` whose new layers are patched as they come, and which says what it runs."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # PEFT saves what this gives, beside configs that hot-swapping leaves behind.
        warn_before_saving(self, _list_patched(self))
        return super().state_dict(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Not by PEFT's hooks: they are every thread's, and stay if an error passes through them.
        names = kwargs.pop("adapter_names", None)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            if names is None:
                yield
            else:
                with peft_rows.name_rows(self, names, args, kwargs):
                    yield

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        super()._replace_module(parent, child_name, new_module, child)
        if isinstance(new_module, lora.LoraLayer) and _explain_left_alone(new_module) is None:
            _patch_layer(new_module)
            keep_unpacked(new_module)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._check_merging(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merging(adapter_names)
        model: Any = super()._unload_and_optionally_merge(
            merge=merge,
            progressbar=progressbar,
            safe_merge=safe_merge,
            adapter_names=adapter_names,
        )
        let_pack(model)
        return model

    def _check_merging(self, adapter_names: list[str] | None) -> None:
        """Refuses or warns of merges that PEFT would make silently, before anything is merged."""
        model: Any = self.model
        peft_tied.refuse(model, adapter_names)
        bypassed.refuse(model, adapter_names)
        warn_of_lost_merges(_list_lora_layers(model))

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        first_forward.watch(model)


def patch(model: nn.Module, strict: bool) -> Report:
    """Does what ``fastlora.patch_peft`` says."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"peft_model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = _list_lora_layers(model)
    if not layers:
        raise ValueError(
            "peft_model: expected a model with LoRA layers of PEFT's, found none in "
            f"{type(unwrap(model)).__name__}: patch what peft.get_peft_model returns (a model "
            "of fastlora.replace_linear needs no patch)"
        )
    reasons = _explain_skipped(model, layers)
    if len(reasons) == len(layers) or (strict and reasons):
        raise ValueError(
            f"peft_model: {len(reasons)} of {len(layers)} LoRA layers cannot be patched: "
            f"{list_some(group_by_reason(reasons), 8, '; ')}; the model is as it was, and PEFT "
            "computes it"
        )
    for name, layer in layers.items():
        if name not in reasons:
            _patch_layer(layer)
    for module in unwrap(model).modules():
        if type(module) is peft.LoraModel:
            module.__class__ = LoraModel
            peft_rows.watch(module)
    keep_unpacked(unwrap(model), stacklevel=3)
    _warn_of_virtual_tokens(unwrap(model))
    bypassed.warn(unwrap(model), layers, stacklevel=4)
    first_forward.watch(_find_innermost(model))
    return report(model)


def unpatch(model: nn.Module) -> None:
    """Does what ``fastlora.unpatch_peft`` says."""
    back = OURS | {LoraModel: peft.LoraModel}
    modules = [module for module in unwrap(model).modules() if type(module) in back]
    if not modules:
        raise ValueError(
            f"peft_model: expected one that patch_peft has patched, got {type(model).__name__}"
        )
    for module in modules:
        vars(module).pop("_receipts", None)
        peft_rows.unwatch(module)
        module.__class__ = back[type(module)]
    let_pack(unwrap(model))
    first_forward.unwatch_all(_find_innermost(model))


def describe(model: nn.Module) -> dict[str, Any]:
    """Returns ``fastlora.report``'s part on PEFT's layers, where some are patched."""
    layers, patched = _list_lora_layers(model), _list_patched(model)
    if not patched:
        return {}
    new = [name for name in layers if name not in patched]
    skipped = dict.fromkeys(new, "not patched: call patch_peft again")
    skipped |= _explain_skipped(model, layers)
    bases = {name: read_product(layer.base_layer) for name, layer in patched.items()}
    return {
        "replaced": {
            name: read_rank(layer) for name, layer in patched.items() if name not in skipped
        },
        "skipped": skipped,
        "around": {
            name: base
            for name, base in bases.items()
            if isinstance(base, str) and name not in skipped
        },
        "merged": tuple(name for name, layer in patched.items() if layer.merged),
        "misstated": list_misstated(model, patched),
    }


def _warn_of_virtual_tokens(model: nn.Module) -> None:
    """Warns of prompt learning around the layers with a transformers that needs a newer PEFT.

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


def _find_innermost(model: nn.Module) -> nn.Module:
    """Finds the base model within PEFT's, which is what PEFT calls, to generate too."""
    inner = unwrap(model)
    return unwrap(inner.get_base_model()) if isinstance(inner, peft.PeftModel) else inner


def _patch_layer(layer: nn.Module) -> None:
    if type(layer) in PATCHED:
        layer.__class__ = PATCHED[type(layer)]


def _list_lora_layers(model: nn.Module) -> dict[str, Any]:
    modules = unwrap(model).named_modules()
    return {name: module for name, module in modules if isinstance(module, lora.LoraLayer)}


def _list_patched(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in _list_lora_layers(model).items() if type(layer) in OURS}


def _explain_skipped(model: nn.Module, layers: dict[str, Any]) -> dict[str, str]:
    """Says why PEFT computes a layer, for each that it computes."""
    reason_of = {
        name: explain_bypass(unwrap(model), [name]) or _explain_left_alone(layer)
        for name, layer in layers.items()
    }
    return {name: reason for name, reason in reason_of.items() if reason is not None}


def _explain_left_alone(layer: Any) -> str | None:
    kind = type(layer)
    if kind not in PATCHED and kind not in OURS:
        return f"it is a {kind.__module__}.{kind.__qualname__}, not a peft.tuners.lora.Linear"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    # Only active adapters; others are examined when they become active.
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return explain_obstacle(layer, active or list(layer.lora_A))
