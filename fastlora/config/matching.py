"""Matching of a config's names with a model's modules, as PEFT reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

Names = str | tuple[str, ...]

# WITHIN matches a name and what lies in it; BEFORE_INDEX finds the index behind a name.
WITHIN = r"(^|.*\.){}($|\..*)"
BEFORE_INDEX = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_ANY_INDEX = r".*?\.[^.]*\.(?P<idx>\d+)\."


def is_match(names: Names, name: str) -> bool:
    """Whether one of ``names`` is it, whole or after a dot; or one regular expression, in full."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == target or name.endswith("." + target) for target in names)


def is_within(modules: Iterable[str], name: str) -> bool:
    """Whether ``name`` is one of ``modules``, whole or after a dot, or lies in one."""
    return any(re.match(WITHIN.format(module), name) for module in modules)


def ends_with_any(modules: Iterable[str], name: str) -> bool:
    """Whether ``name`` ends in one of ``modules``, wherever: "head" is the end of "lm_head"."""
    return any(name.endswith(module) for module in modules)


def find_layer_index(name: str, patterns: tuple[str, ...]) -> int | None:
    """Finds the first number in ``name`` after one of ``patterns``, or any name but the first."""
    # PEFT's default wants a name before it, so that a dot must come first.
    for regex in map(BEFORE_INDEX.format, patterns) if patterns else [_ANY_INDEX]:
        match = re.match(regex, name)
        if match is not None:
            # An alternative of a pattern's may have matched without coming to an index.
            return int(match["idx"]) if match["idx"] else None
    return None


def look_up(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the value of the first key that is a regular expression for the end of ``name``."""
    for key, value in pattern.items():
        if _compile_ending(key).match(name):
            return value
    return default


def find_overlaps(pattern: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Finds {name: {key: value}} where keys of different values match: order decides."""
    if len(pattern) < 2:
        return {}
    keys = [(key, value, _compile_ending(key)) for key, value in pattern.items()]
    matching_keys = {name: {k: v for k, v, ending in keys if ending.match(name)} for name in names}
    return {name: of for name, of in matching_keys.items() if len(set(of.values())) > 1}


def resolve_overlaps(
    pattern: Mapping[str, Any], names: Iterable[str], values: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns ``pattern`` with the same values for ``names`` in whatever order it is read.

    Keys that overlap give way to the full names of all that they match. values: {name: value} that
    count where keys overlap and one of them has it, instead of the first one's.
    """
    names = list(names)
    overlaps = find_overlaps(pattern, names)
    mixed = {key: pattern[key] for of in overlaps.values() for key in of}
    plain = {key: value for key, value in pattern.items() if key not in mixed}
    for name in names:
        if look_up(mixed, name, None) is None:
            continue
        value = (values or {}).get(name)
        if value not in overlaps.get(name, {}).values():
            value = look_up(pattern, name, None)
        plain[escape_name(name)] = value
    return plain


def escape_name(name: str) -> str:
    """Makes a key for ``name`` alone: others match ends of names, and any character at a dot."""
    return f"^{re.escape(name)}"


def name_exactly(names: Iterable[str], others: Iterable[str]) -> Names:
    """Returns names that none of ``others`` ends in as they are; else a regular expression."""
    names = tuple(dict.fromkeys(names))
    suffixes = {*names}
    for other in others:
        parts = other.split(".")
        if any(".".join(parts[i:]) in suffixes for i in range(len(parts))):
            return "|".join(map(re.escape, names))
    return names


# More than re itself remembers: files may have a key a layer, all of which every layer asks.
@lru_cache(maxsize=1 << 15)
def _compile_ending(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def check_names_or_regex(field_name: str, value: object) -> Names | None:
    """Checks a field's names, or its regular expression."""
    if isinstance(value, str):
        if field_name == "exclude_modules" or value.lower() != "all-linear":
            check_regex(field_name, value)
        return value
    return _check_names(field_name, value, "a list of names or a regular expression")


def check_indices(value: object) -> int | tuple[int, ...] | None:
    """Checks layers_to_transform."""
    listed = (value,) if isinstance(value, int) else value
    if listed is None:
        return None
    if isinstance(listed, Iterable) and not isinstance(listed, (str, Mapping)):
        numbers = tuple(listed)
        if all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
            return value if isinstance(value, int) else numbers
    raise TypeError(f"layers_to_transform: expected an index or a list of them, got {value!r}")


def check_patterns(value: object) -> Names | None:
    """Checks layers_pattern."""
    listed = (value,) if isinstance(value, str) else value
    names = _check_names("layers_pattern", listed, "a name or a list of them")
    for pattern in names or ():
        check_regex("layers_pattern", pattern, BEFORE_INDEX)
    return value if isinstance(value, str) else names


def check_modules(value: object) -> tuple[str, ...] | None:
    """Checks modules_to_save."""
    names = _check_names("modules_to_save", value, "a list of names")
    for name in names or ():
        if not name:
            raise ValueError("modules_to_save: expected names, got an empty one")
        check_regex("modules_to_save", name, WITHIN)
    # PEFT's files name heads once more each time that they are loaded and saved.
    return None if names is None else tuple(dict.fromkeys(names))


def _check_names(field_name: str, value: object, expected: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
        names = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
        if all(isinstance(name, str) for name in names):
            return names
    raise TypeError(f"{field_name}: expected {expected}, got {value!r}")


def check_regex(field_name: str, pattern: str, around: str = "{}") -> None:
    """Raises ValueError unless ``pattern`` is a regular expression, also within ``around``."""
    try:
        re.compile(around.format(pattern))
    except re.error as error:
        raise ValueError(
            f"{field_name}: {pattern!r} is not a regular expression: {error}"
        ) from None
