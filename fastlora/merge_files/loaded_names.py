"""Names of a transformers model's tensors for those of its checkpoints, as it loads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Loaded:
    """Table of names. names: the model's name of each checkpoint tensor that is loaded as it is.

    made: sources of each of the model's tensors that is computed while loading.
    """

    names: dict[str, str] = field(default_factory=dict)
    made: dict[str, list[str]] = field(default_factory=dict)


def look_up_names(model: nn.Module, names: Iterable[str]) -> Loaded:
    """Looks up how ``model`` would load tensors of these names; unknown ones are in neither.

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
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    loaded = Loaded()
    for name in sorted(names, key=dot_natural_key):
        place, source = rename_source_key(name, renamings, converters, prefix, state)
        if place not in state and name in state:
            place, source = rename_source_key(name, [], [], prefix, state)
        if source is None:
            if place in state:
                loaded.names[name] = place
            continue
        first, *others = targets[source].target_patterns
        for target in (first, *others):
            loaded.made.setdefault(place.replace(first, target), []).append(name)
    return loaded
