"""Triton's interpreter, without what it does again and again: two thirds of its time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Leaves every result as it is; a triton that is built otherwise is left alone."""
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _looked_up(interpreter._get_np_dtype)
    options = getattr(interpreter.interpreter_builder, "options", None)
    # Sums of integers are taken in 64 bits too, for an assertion that only debugging looks at.
    if hasattr(options, "sanitize_overflow") and not options.debug:
        quiet = dataclasses.replace(options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = quiet


def _once_a_launch(patch: Callable) -> Callable:
    """A launch puts functions of its own into triton.language; so did every call within it."""
    there: set[str] = set()

    @functools.cache
    def languages(fn: Callable) -> frozenset[str]:
        return frozenset(m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core)

    @functools.wraps(patch)
    def patch_once(fn: Callable) -> interpreter._LangPatchScope:
        wanted = languages(fn)
        if wanted and wanted <= there:
            return interpreter._LangPatchScope()  # has nothing to restore
        scope = patch(fn)
        there.update(wanted)
        restore = scope.restore

        def restore_and_forget() -> None:
            there.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    return patch_once


def _looked_up(dtype_of: Callable) -> Callable:
    """It makes a table of all dtypes for each that it looks up."""
    names: dict[str, object] = {}

    @functools.wraps(dtype_of)
    def look_up(dtype: tl.dtype) -> object:
        if dtype.name not in names:
            names[dtype.name] = dtype_of(dtype)
        return names[dtype.name]

    return look_up
