"""Triton's interpreter, without what it does again and again: most of its time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

core = tl.core
# What `quicken` has changed: each has the `__wrapped__` that was there.
wrapped: list[tuple[object, str]] = []


def quicken() -> None:
    """Leaves every result as it is; a triton that is built otherwise is left alone."""
    if hasattr(interpreter, "_LangPatchScope"):
        _wrap(interpreter, "_patch_lang", _once_a_launch)
    _wrap(interpreter, "_get_np_dtype", _looked_up)
    _wrap(core, "_unwrap_if_constexpr", _of_few_kinds)
    _wrap(core.dtype, "__eq__", _same_first)
    _wrap(core.block_type, "__init__", _made_once)
    _wrap(core.tensor, "__init__", _of_known_shape)
    _wrap(TritonSemantic, "broadcast_impl_value", _where_shapes_differ)
    options = getattr(interpreter.interpreter_builder, "options", None)
    # Sums of integers are taken in 64 bits too, for an assertion that only debugging looks at.
    if hasattr(options, "sanitize_overflow") and not options.debug:
        quiet = dataclasses.replace(options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = quiet


def _wrap(owner: object, name: str, quick: Callable[[Callable], Callable]) -> None:
    if hasattr(owner, name):
        setattr(owner, name, quick(getattr(owner, name)))
        wrapped.append((owner, name))


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


def _of_few_kinds(unwrap: Callable) -> Callable:
    """It asks of every value whether it is a constant or may hold some."""
    holds: dict[type, bool] = {}

    @functools.wraps(unwrap)
    def unwrap_if_constant(value: object) -> object:
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        if kind not in holds:
            holds[kind] = issubclass(kind, (list, tuple, core.tuple, core.constexpr))
        return unwrap(value) if holds[kind] else value

    return unwrap_if_constant


def _same_first(equals: Callable) -> Callable:
    @functools.wraps(equals)
    def is_or_equals(self: tl.dtype, other: object) -> bool:
        return self is other or equals(self, other)

    return is_or_equals


def _made_once(init: Callable) -> Callable:
    """There are few types of blocks, and one is made for every step."""
    made: dict[tuple, dict[str, object]] = {}

    @functools.wraps(init)
    def init_once(self: tl.block_type, element_ty: tl.dtype, shape: Iterable) -> None:
        sizes = tuple([s.value if type(s) is core.constexpr else s for s in shape])
        key = (element_ty.name, sizes, *map(type, sizes))
        if key not in made:
            init(self, element_ty, shape)
            made[key] = dict(vars(self))
        vars(self).update(made[key], element_ty=element_ty)

    return init_once


def _of_known_shape(init: Callable) -> Callable:
    """Every tensor has its shape in constants of its own."""
    known: dict[tuple, tuple] = {}

    @functools.wraps(init)
    def init_of_known(self: tl.tensor, handle: object, type: tl.dtype) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in known:
            init(self, handle, type)
            known[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[sizes]

    return init_of_known


def _where_shapes_differ(broadcast: Callable) -> Callable:
    @functools.wraps(broadcast)
    def broadcast_others(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple:
        shapes = [t.type.shape.values if t.type.is_block() else () for t in (lhs, rhs)]
        return (lhs, rhs) if shapes[0] == shapes[1] else broadcast(self, lhs, rhs)

    return broadcast_others
