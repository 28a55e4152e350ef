"""What a transformers model calls the tensors of its checkpoints: the table it loads them by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Loaded:
    """Of names in a checkpoint. names: the model's name of each that is loaded as it is.

    made: of each tensor of the model that is computed while loading, what it is computed of.
    """

    names: dict[str, str] = field(default_factory=dict)
    made: dict[str, list[str]] = field(default_factory=dict)


def loaded(model: nn.Module, names: Iterable[str]) -> Loaded:
    """How ``model`` would load tensors of these names; what it has no place for is in neither.

    The order of steps is that of transformers' ``convert_and_load_state_dict_in_model`` (5.23.0,
    5.24.0). Raises LookupError where the installed transformers has no such table.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise LookupError(f"its renamings cannot be read: {error}") from None
    # Fresh ones: some remember what they have seen.
    steps = get_model_conversion_mapping(model)  # pyright: ignore[reportArgumentType]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    targets = {source: step for step in converters for source in step.source_patterns}
    prefix, own = getattr(model, "base_model_prefix", ""), model.state_dict()
    found = Loaded()
    for name in sorted(names, key=dot_natural_key):
        place, source = rename_source_key(name, renamings, converters, prefix, own)
        if place not in own and name in own:
            place, source = rename_source_key(name, [], [], prefix, own)
        if source is None:
            if place in own:
                found.names[name] = place
            continue
        first, *rest = targets[source].target_patterns
        for target in (first, *rest):
            found.made.setdefault(place.replace(first, target), []).append(name)
    return found
