"""Layers of a model that a config means: all of it checked before anything is changed."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from torch import nn

from fastlora.config import LoRAConfig, matching
from fastlora.config.listing import group_by_reason, list_some
from fastlora.inspection.bypass import explain_bypass, explain_rescaling
from fastlora.inspection.layers import explain_unsupported, find_peft_layers, find_places, is_linear
from fastlora.inspection.wrappers import unwrap
from fastlora.modules import saved_modules

_SHOWN = 20  # names in an error: all of a usual model's kinds of layers
_REASONS = 8


@dataclass(frozen=True)
class Plan:
    """Linears to replace, {first full name: (module, its names)}, and others skipped, why.

    Names are of one place: an attribute of one parent. saved: {full name: module} of those to train
    whole, as copies. elsewhere: {name: other places of the same module, which keep it as it is}.
    """

    linears: dict[str, tuple[nn.Module, list[str]]]
    skipped: dict[str, str]
    saved: dict[str, nn.Module] = field(default_factory=dict)
    elsewhere: dict[str, list[str]] = field(default_factory=dict)


def make_plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Finds the linears and whole modules of ``model`` that ``config`` names; changes nothing."""
    if config.target_modules is None:
        raise ValueError(
            "target_modules: expected a list of names, a regular expression or "
            '"all-linear", got None'
        )
    inner = unwrap(model)
    if peft_names := find_peft_layers(inner):
        # Their parts are linears too, lora_A and lora_B among them.
        raise ValueError(
            f"model: PEFT has put adapters into {len(peft_names)} of its layers ({peft_names[0]}, "
            "…): give the base model instead (peft_model.unload() returns it), or keep PEFT's "
            "layers and call fastlora.patch_peft"
        )
    linears: dict[str, tuple[nn.Module, list[str]]] = {}
    skipped: dict[str, str] = {}
    refused: dict[str, str] = {}
    elsewhere: dict[str, list[str]] = {}
    head = _find_output_embedding(inner)
    for module, (known_as, elsewhere_names) in find_places(inner).items():
        # As in PEFT: a layer goes by its first name, and gets its adapter in that place.
        first = known_as[0]
        named = config.targets(first)
        if not named and not (config.all_linear and is_linear(module)):
            for name in filter(config.targets, (*known_as[1:], *elsewhere_names)):
                skipped[name] = f"it is the same layer as {first}, whose name the config must mean"
            continue
        reason = (
            explain_bypass(inner, known_as)
            or explain_rescaling(inner, known_as)
            or explain_unsupported(module)
        )
        if config.excludes(first):
            is_saved = matching.is_within(config.modules_to_save or (), first)
            skipped[first] = (
                "modules_to_save trains it whole" if is_saved else "excluded by exclude_modules"
            )
        elif getattr(module, "holds_lora", False):
            refused[first] = str(reason)
        elif not named and module is head:
            skipped[first] = 'the output embedding, which "all-linear" leaves out'
        elif reason is not None:
            (refused if named else skipped)[first] = reason
        else:
            linears[first] = (module, known_as)
            if elsewhere_names:
                elsewhere[first] = elsewhere_names
    if refused:
        reasons = list_some(group_by_reason(refused), _REASONS, "; ")
        raise ValueError(
            f"target_modules: cannot replace {reasons} (name other layers, or use exclude_modules)"
        )
    if not linears:
        raise ValueError(_explain_no_match(inner, config, skipped))
    saved = saved_modules.find(inner, config)
    saved_modules.check_disjoint(saved, [name for _, names in linears.values() for name in names])
    return Plan(linears, skipped, saved, elsewhere)


def find_unused_names(config: LoRAConfig, chosen: Plan) -> list[str]:
    """Lists names in the config that no layer goes by, as mistyped ones: a sentence a field."""
    replaced = [name for _, names in chosen.linears.values() for name in names]
    targets = config.target_modules if isinstance(config.target_modules, tuple) else ()
    known_names = [*replaced, *chosen.skipped]
    unused_names = {
        "target_modules": [
            n for n in targets if not any(matching.is_match((n,), k) for k in known_names)
        ]
    }
    for field_name in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, field_name) or {}
        unused_names[field_name] = [
            key
            for key in keys
            if not any(matching.look_up({key: True}, name, False) for name in replaced)
        ]
    return [
        f"{field_name}: no layer that was replaced is called {list_some(map(repr, names), _SHOWN)}"
        for field_name, names in unused_names.items()
        if names
    ]


def _find_output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    embedding = getter() if callable(getter) else None
    return embedding if isinstance(embedding, nn.Module) else None


def _explain_no_match(model: nn.Module, config: LoRAConfig, skipped: dict[str, str]) -> str:
    linears = [n for n, m in model.named_modules() if is_linear(m)]
    target_modules = config.target_modules
    is_long = isinstance(target_modules, tuple) and len(target_modules) > _SHOWN
    shown = (
        f"({list_some(map(repr, target_modules or ()), _SHOWN)})"
        if is_long
        else repr(target_modules)
    )
    message = f"target_modules: no linear layer matches {shown}"
    if config.layers_to_transform is not None:
        pattern = f" of {config.layers_pattern!r}" if config.layers_pattern else ""
        message += f" within layers_to_transform={config.layers_to_transform!r}{pattern}"
    if skipped:
        message += (
            f" ({len(skipped)} skipped: {list_some(group_by_reason(skipped), _REASONS, '; ')})"
        )
    if not linears:
        return message + "; the model has no nn.Linear"
    suffixes = sorted({name.rpartition(".")[2] for name in linears})
    targets = (
        [target_modules] if isinstance(target_modules, str) else (target_modules or ())[:_SHOWN]
    )
    near = [
        m for w in targets for m in difflib.get_close_matches(w, suffixes + linears, cutoff=0.5)
    ]
    hint = f"; near names: {list_some(dict.fromkeys(near), _SHOWN)}" if near else ""
    return f"{message}{hint}; its linears end in {list_some(suffixes, _SHOWN)}"
