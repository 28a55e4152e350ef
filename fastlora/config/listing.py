"""Names in a message: the first few, and how many more there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def list_some(names: Iterable[object], shown: int = 4, separator: str = ", ") -> str:
    """Lists the first of ``names``, in their order (a set's alphabetically), and how many more.

    Empty where there are none. What is listed is meant to be short itself.
    """
    listed = sorted(map(str, names)) if isinstance(names, (set, frozenset)) else [*map(str, names)]
    more = len(listed) - shown
    return separator.join(listed[:shown]) + (f" and {more} more" if more > 0 else "")


def group_by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Lists each reason of {layer: reason} once, with the first of its layers."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name)
    return [
        f"{first} and {len(others)} more: {reason}" if others else f"{first}: {reason}"
        for reason, (first, *others) in layers.items()
    ]
