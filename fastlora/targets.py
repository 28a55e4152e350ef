"""Which layers of a model a config means: all of it checked before anything is changed."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from torch import nn

from fastlora import matching, saved_modules
from fastlora.config import LoRAConfig
from fastlora.wrapping import is_linear, peft_layers, unsupported, unwrapped

_SHOWN = 20  # names in an error: all of a usual model's kinds of layers


@dataclass(frozen=True)
class Plan:
    """Linears to replace, {first full name: (module, all its names)}, and others skipped, why.

    saved: {full name: module} of those to train whole, as copies.
    """

    linears: dict[str, tuple[nn.Module, list[str]]]
    skipped: dict[str, str]
    saved: dict[str, nn.Module] = field(default_factory=dict)


def plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Which linears and whole modules of ``model`` ``config`` names; nothing is changed."""
    if config.target_modules is None:
        raise ValueError(
            "target_modules: expected a list of names, a regular expression or "
            '"all-linear", got None'
        )
    inner = unwrapped(model)
    if theirs := peft_layers(inner):
        # Their parts are linears too, lora_A and lora_B among them.
        raise ValueError(
            f"model: PEFT has put adapters into {len(theirs)} of its layers ({theirs[0]}, …): give "
            "the base model instead (peft_model.unload() returns it), or keep PEFT's layers and "
            "call fastlora.patch_peft"
        )
    # A module reached by two names is one layer, to be replaced under both.
    names: dict[nn.Module, list[str]] = {}
    for name, module in inner.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(module, []).append(name)
    linears: dict[str, tuple[nn.Module, list[str]]] = {}
    skipped: dict[str, str] = {}
    refused: dict[str, str] = {}
    head = _output_embedding(inner)
    for module, known_as in names.items():
        first = known_as[0]
        named = any(config.targets(name) for name in known_as)
        if not named and not (config.all_linear and is_linear(module)):
            continue
        reason = bypassed(inner, known_as) or unsupported(module)
        if any(config.excludes(name) for name in known_as):
            whole = any(matching.is_within(config.modules_to_save or (), n) for n in known_as)
            skipped[first] = (
                "modules_to_save trains it whole" if whole else "excluded by exclude_modules"
            )
        elif getattr(module, "holds_lora", False):
            refused[first] = str(reason)
        elif not named and module is head:
            skipped[first] = 'the output embedding, which "all-linear" leaves out'
        elif reason is not None:
            (refused if named else skipped)[first] = reason
        else:
            linears[first] = (module, known_as)
    if refused:
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(
            f"target_modules: cannot replace {listed} (name other layers, or use exclude_modules)"
        )
    if not linears:
        raise ValueError(_no_match(inner, config, skipped))
    saved = saved_modules.find(inner, config)
    saved_modules.check_apart(saved, [name for _, names in linears.values() for name in names])
    return Plan(linears, skipped, saved)


def unused(config: LoRAConfig, chosen: Plan) -> list[str]:
    """Of names in the config that no layer goes by, as mistyped ones: a sentence a field."""
    replaced = [name for _, names in chosen.linears.values() for name in names]
    wanted = config.target_modules if isinstance(config.target_modules, tuple) else ()
    known = [*replaced, *chosen.skipped]
    found = {
        "target_modules": [n for n in wanted if not any(matching.matches((n,), k) for k in known)]
    }
    for field_name in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, field_name) or {}
        found[field_name] = [
            key
            for key in keys
            if not any(matching.overridden({key: True}, name, False) for name in replaced)
        ]
    return [
        f"{name}: no layer that was replaced is called {', '.join(map(repr, of))}"
        for name, of in found.items()
        if of
    ]


def bypassed(model: nn.Module, names: list[str]) -> str | None:
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
    linears = [n for n, m in model.named_modules() if is_linear(m)]
    message = f"target_modules: no linear layer matches {config.target_modules!r}"
    if config.layers_to_transform is not None:
        pattern = f" of {config.layers_pattern!r}" if config.layers_pattern else ""
        message += f" within layers_to_transform={config.layers_to_transform!r}{pattern}"
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
    some = ", ".join(suffixes[:_SHOWN]) + (", …" if len(suffixes) > _SHOWN else "")
    return f"{message}{hint}; its linears end in {some}"
