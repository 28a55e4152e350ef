"""Plain tensors, whose numbers can be read where they lie."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain(t: Tensor) -> bool:
    """Whether a tensor's numbers lie in memory as its dtype and strides say."""
    plain, dispatch = (getattr(kind, "__torch_dispatch__") for kind in (Tensor, type(t)))  # noqa: B009
    return dispatch is plain


def explain_unreadable(t: Tensor) -> str | None:
    """Says why no op of ours can read a tensor: what it is instead of a plain one.

    torch's own stand-ins (fake and functional tensors) are plain, and so are subclasses that only
    have other functions or attributes. A DTensor is not plain: code that can take one asks before.
    """
    kind = type(t)
    if not is_plain(t) and not kind.__module__.startswith("torch._subclasses."):
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"a {name}, which holds its numbers in a form of its own (quantized, say)"
    if t.layout is not torch.strided:
        return f"one of layout {t.layout}"
    return "a nested one" if t.is_nested else None
