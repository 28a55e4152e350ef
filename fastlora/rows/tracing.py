"""A mode that follows owners through every op that runs within it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.inspection import mode_stack
from fastlora.rows.marks import Marks
from fastlora.rows.owners import MIXED, Owners, fill_owner, join_along
from fastlora.rows.rules.computing import mix_all
from fastlora.rows.rules.op import Op, Rule, list_tensors
from fastlora.rows.rules.table import find_rule

# Ops that hand values to Python, which may go another way by them next time.
_READING = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
_LEAVING_TORCH = {
    Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__,
    Tensor.__format__, Tensor.tensor_split, torch.tensor_split, torch.allclose, Tensor.allclose,
}  # fmt: skip
# Files that read values only to see whether a mask is needed: the same rows either way.
_HARMLESS = (
    "transformers/masking_utils.py",
    "transformers/modeling_attn_mask_utils.py",
    "transformers/modeling_flash_attention_utils.py",
    "transformers/integrations/sdpa_attention.py",
)


class _Handling:
    """How an op is handled."""

    __slots__ = ("decomposes", "reads", "rule", "view", "views_in_place", "writes")

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.rule: Rule | None = find_rule(func)
        self.reads = schema.name in _READING or _is_value_dependent(func)
        alias = [r.alias_info for r in schema.returns]
        # transpose_ and the like: another view of the same memory, under the same name.
        self.views_in_place = torch.Tag.inplace_view in func.tags
        self.view = self.views_in_place or any(a is not None and not a.is_write for a in alias)
        self.writes = tuple(
            (i, a.name)
            for i, a in enumerate(schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        )
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        )
        self.decomposes = self.rule is None and composite


_handlings: dict[Any, _Handling] = {}


class _Thread(threading.local):
    trace: Trace | None = None


_running = _Thread()


def declare(t: Tensor, of: Tensor, *dims: int) -> None:
    """Gives ``t``, where a trace runs, the owners of ``of``, whose dimensions it has as ``dims``.

    For moves that no op shows, such as attention that takes keys from where it has put them.
    """
    trace = _running.trace
    if trace is not None:
        o = trace.marks.get(of)
        trace.marks.set(t, None if o is None else join_along(o, [-1]).transpose(dims))  # pyright: ignore


class Trace(TorchDispatchMode):
    """A mode that follows this thread's ops between ``open()`` and ``close()``.

    by_value: the owners hold for these values alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.marks = Marks()
        self.by_value = False
        self._read_watch = _ReadWatch(self)
        self._before: Trace | None = None

    def open(self) -> None:
        self._before, _running.trace = _running.trace, self
        self.__enter__()
        self._read_watch.__enter__()

    def close(self) -> None:
        mode_stack.remove_mode(self._read_watch)
        self.__exit__(None, None, None)
        _running.trace = self._before

    def owners_of(self, t: Tensor) -> Owners | None:
        return self.marks.get(t)

    def note_read(self) -> None:
        """Notes that Python has been handed a value."""
        self.by_value = self.by_value or not _is_harmless_read()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handling = _handlings.get(func)
        if handling is None:
            handling = _handlings[func] = _Handling(func)
        if handling.decomposes:
            with self:
                return func.decompose(*args, **kwargs)  # pyright: ignore[reportFunctionMemberAccess]
        if handling.reads or _is_by_mask(func, args):
            self.note_read()
        operands = list_tensors(args) + (list_tensors(list(kwargs.values())) if kwargs else [])
        has_owners = [t for t in operands if self.marks.get(t) is not None]
        out = func(*args, **kwargs)
        if has_owners:
            self._follow(handling, func, args, kwargs, out)
        return out

    def _follow(
        self,
        handling: _Handling,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> None:
        if handling.views_in_place or (handling.rule is None and handling.view):
            return  # Read from the memory, when somebody asks.
        op = Op(func, args, kwargs, self.marks)
        mutated = [args[i] if i < len(args) else kwargs.get(name) for i, name in handling.writes]
        op.out = out if list_tensors(out) else mutated
        outs = op.outs
        if not outs:
            return
        try:
            result_owners = (handling.rule or mix_all)(op)
        except (IndexError, TypeError, ValueError, AttributeError):
            # A form that the rule does not know.
            result_owners = mix_all(op)
        owners_of_outs = (
            result_owners if isinstance(result_owners, list) else [result_owners] * len(outs)
        )
        self.by_value = self.by_value or op.by_value
        targets = list_tensors(mutated)
        for t, owners in zip(outs, map(_fit, owners_of_outs, outs), strict=True):
            if any(t is w for w in targets):
                self.marks.write(t, owners)
            else:
                self.marks.set(t, owners)
        if handling.rule is None or not list_tensors(out):
            return
        for t in targets:
            if not any(t is o for o in outs):
                self.marks.write(t, _fit(owners_of_outs[0], t))


def _is_value_dependent(func: Any) -> bool:
    """Whether values decide on the shape of an op's result, or come to Python by it."""
    if func._schema.name == "aten::index":
        return False  # by a mask it does, see below
    tags = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
    also = ("aten::_nnz", "aten::_pack_padded_sequence")
    return func._schema.name in also or any(tag in func.tags for tag in tags)


def _is_by_mask(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call is ``x[mask]``, of as many elements as the mask has ones."""
    return func._schema.name == "aten::index" and any(
        isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in args[1]
    )


def _fit(owners: Owners | None, t: Tensor) -> Owners | None:
    """Checks the owners that a rule gave: MIXED where they do not fit the result's form."""
    is_fitting = owners is None or (
        owners.ndim == t.dim()
        and all(a in (1, b) for a, b in zip(owners.shape, t.shape, strict=True))
    )
    return owners if is_fitting else fill_owner(MIXED, t.dim())


class _ReadWatch(TorchFunctionMode):
    """A mode that sees what reaches Python past all ops."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LEAVING_TORCH:
            self._trace.note_read()
        return func(*args, **(kwargs or {}))


def _is_harmless_read() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if "/torch/" not in name and "/fastlora/rows/" not in name:
            return name.endswith(_HARMLESS)
        frame = frame.f_back
    return False
