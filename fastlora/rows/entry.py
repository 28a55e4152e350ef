"""Where a batch comes into a model: its rows are marked, and what is found of them is kept.

A forward whose inputs look like an earlier one's, and in which no value of a tensor decided on
anybody's rows, is not followed again if all layers saw the batch's rows in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.inspection.wrappers import unwrap
from fastlora.rows.eagerly import Eagerly
from fastlora.rows.frame import Frame, Place
from fastlora.rows.inputs import Inputs, encoder_of
from fastlora.rows.known_models import rows_of_inputs
from fastlora.rows.opened import Closing, Opened, Opening
from fastlora.rows.owners import along
from fastlora.rows.repeatable import all_trusted, has_foreign_hooks, state_of
from fastlora.rows.signature import Unseen, loosely, rows_in, signature_of, tensors_of
from fastlora.rows.statements import Statement, modules_by_name
from fastlora.rows.tracing import Trace

_KEPT = 256


class Watch:
    """What the modules of one model say when a batch comes in and leaves; every thread's.

    routing: of the thread that asks. layers: where the batch may come in at any module that
    contains one of these, not only at the model and its encoder.
    """

    def __init__(
        self, model: nn.Module, routing: Any, layers: Iterable[nn.Module] | None = None
    ) -> None:
        self.root = unwrap(model)
        self.routing = routing
        self.verdicts: dict[Any, dict[int, Place]] = {}
        # {signature without lengths: (what was found last, what was found of two lengths)}
        self.lengths: dict[Any, tuple[Any, dict[int, Place] | None]] = {}
        self.inputs = Inputs(self.root)
        self._trusted: bool | None = None
        self._settled = True
        # Whether every layer has seen the batch first in all forwards; None before the first.
        self.plain: bool | None = None
        for module in _entries(self.root, layers):
            self.hook(module)

    def __getstate__(self) -> dict[str, Any]:
        # By the ids of modules, which a copy has others of.
        return vars(self) | {"verdicts": {}, "lengths": {}}

    def hook(self, module: nn.Module) -> None:
        hooks = module._forward_pre_hooks.values()
        if not any(isinstance(hook, Opening) and hook.watch is self for hook in hooks):
            module.register_forward_pre_hook(Opening(self), with_kwargs=True)
            module.register_forward_hook(Closing(self), always_call=True)

    def remove(self) -> None:
        """Takes back what ``hook`` has done, everywhere."""
        for module in self.root.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if isinstance(hook, (Opening, Closing)) and hook.watch is self:
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
                        module._forward_hooks_always_called.pop(key, None)

    def state(self, statements: Mapping[str, Statement]) -> dict[int, Statement]:
        """By module, each of which says when it runs."""
        modules = modules_by_name(self.root) if statements else {}
        for name in statements:
            self.hook(modules[name])
        return {id(modules[name]): each for name, each in statements.items()}

    def name(self, module: nn.Module) -> str:
        found = {id(m): name for name, m in modules_by_name(self.root).items()}
        return found.get(id(module), type(module).__name__)

    # --- a module begins and ends ---

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = self.routing
        frame = routing.frame
        if frame is None:
            routing.frame = self._opened(module, self.inputs.bound(module, args, kwargs))
            frame = routing.frame
        elif frame.module is module:
            frame.depth += 1
        elif frame.module is None:
            routing.frame = frame = self._nested(
                frame, module, self.inputs.bound(module, args, kwargs)
            )
        statement = routing.stated.get(id(module)) if routing.stated else None
        if statement is not None and frame.trace is not None:
            self._state(frame, module, statement, args, kwargs)

    def leave(self, module: nn.Module, output: Any) -> None:
        frame = self.routing.frame
        if frame is None:
            return
        if frame.stated and id(module) in self.routing.stated:
            frame.stated.pop()
        if frame.module is not module:
            return
        if frame.depth:
            frame.depth -= 1
            return
        frame.close(output)
        self.routing.frame = frame.outer
        if frame.outer is not None and frame.outer.once and module is self.root:
            self.routing.leave()

    def _opened(self, module: nn.Module, given: dict[str, Any]) -> Frame:
        routing = self.routing
        statement = routing.stated.get(id(module)) if routing.stated else None
        dim = 0 if statement is None else statement.dim
        batch = self.inputs.batch(module, given)
        rows = rows_in(batch, dim)
        count = len(routing.slots)
        if rows is not None and rows not in {count, count * routing.copies}:
            raise routing.miscounted(count, rows)
        copies = 1 if rows is None or not count else rows // count
        owners = tuple(i for i in range(count) for _ in range(copies))
        if routing.uniform or rows is None:
            return Opened(self, module, owners, None if routing.uniform else Trace())
        key = None
        known = rows_of_inputs(module, given) if dim == 0 else None
        if known is None and not any(s.rows for s in routing.stated.values()):
            key = self._key(module, owners, given)
            found = None if key is None else self.verdicts.get(key) or self.of_any_length(key)
            if found is not None:
                return Opened(self, module, owners, None, found)
        trace = Trace()
        for value in batch:
            for t in tensors_of(value):
                if t.dim() > dim and t.shape[dim] == rows:
                    trace.marks.set(t, along(dim, owners, t.dim()))
        for name, of_ids in (known or {}).items():
            t = given[name]
            trace.marks.set(t, along(0, [owners[i] for i in of_ids], t.dim()))
        return Opened(self, module, owners, trace, keep=key)

    def distrust(self, found: dict[int, Place]) -> None:
        """What was found does not hold: such calls are followed each time from now on."""
        for kept in (self.verdicts, self.lengths):
            for key, value in list(kept.items()):
                if value is found or value == (found, found):
                    del kept[key]
        self._settled = False

    def proved(self, plain: bool) -> None:
        """Whether a forward has shown every layer the batch's rows, first and in order."""
        self.plain = plain and self.plain is not False

    @contextmanager
    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Around a call of the model, which may be compiled once its rows are known."""
        self.enter(self.root, args, kwargs)
        try:
            yield
        except BaseException:
            self.routing.leave()
            raise
        self.leave(self.root, True)

    @contextmanager
    def tokens(self, ids: Tensor) -> Iterator[None]:
        """Around a call in which every token is a row: layers must see ids (1, T) in order."""
        trace, order = Trace(), tuple(range(ids.shape[1]))
        trace.marks.set(ids, along(1, order, 2))
        self.routing.frame = Opened(self, None, order, trace)
        try:
            yield
        finally:
            self.routing.leave()

    @contextmanager
    def eagerly_at_first(self) -> Iterator[None]:
        """Around a batch whose calls may be compiled: the first runs as it was written."""
        routing, eagerly = self.routing, Eagerly()
        routing.proved = bool(self.plain)
        if not self.plain and not routing.uniform:
            eagerly.begin()
        try:
            yield
        finally:
            eagerly.end()

    def _key(self, module: nn.Module, owners: tuple[int, ...], given: dict[str, Any]) -> Any:
        """What two forwards have in common that go the same way; None where nobody can tell."""
        if self._trusted is None:
            self._trusted = all_trusted(self.root)
        if not (self._trusted and self._settled) or has_foreign_hooks(self.root):
            return None
        try:
            signature = signature_of(given)
        except Unseen:
            return None
        stated = tuple((i, each.dim) for i, each in self.routing.stated.items())
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return id(module), module.training, owners, stated, modes, signature

    def goes_alike(self) -> bool:
        """Whether a forward is taken to go the same way once it is compiled."""
        return self._settled and state_of(self.root) is not None

    def of_any_length(self, key: Any) -> dict[int, Place] | None:
        """What two texts' lengths have had in common, if they had all."""
        return self.lengths.get((key[:-1], loosely(key[-1])), (0, None))[1]

    def keep(self, key: Any, found: dict[int, Place]) -> None:
        for kept in (self.verdicts, self.lengths):
            while len(kept) >= _KEPT:
                kept.pop(next(iter(kept)), None)
        self.verdicts[key] = found
        loose = (key[:-1], loosely(key[-1]))
        if loose[1] is not None:
            before, agreed = self.lengths.get(loose, (found, None))
            if loose in self.lengths:
                agreed = found if before == found else None
            self.lengths[loose] = (found, agreed)

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Around a call of the model's ``generate``, which may do more than forwards of the batch.

        transformers' own keeps all rows to the end, copies side by side; any other is followed from
        begin to end, and that one to its first forward where images are its rows' by their tokens.
        """
        routing = self.routing
        function = getattr(getattr(self.root, "generate", None), "__func__", None)
        own = getattr(function, "__module__", None) == "transformers.generation.utils"
        plain = own and kwargs.get("custom_generate") is None
        names = dict(zip(("input_ids", "generation_config"), args, strict=False)) | kwargs
        known = rows_of_inputs(self.root, names)
        if not routing.uniform and (known is not None or not plain):
            routing.frame = self._whole(args, names, known or {}, plain)
        try:
            yield
        finally:
            routing.leave()

    def _whole(
        self, args: tuple[Any, ...], given: dict[str, Any], known: Mapping[str, Any], once: bool
    ) -> Frame:
        count, trace = len(self.routing.slots), Trace()
        for t in tensors_of(self.inputs.batch(self.root, given) or list(args[:1])):
            if t.dim() and t.shape[0] == count:
                trace.marks.set(t, along(0, range(count), t.dim()))
        for name, rows in known.items():
            trace.marks.set(given[name], along(0, rows, given[name].dim()))
        return Opened(self, None, tuple(range(count)), trace, once=once)

    def _nested(self, outer: Frame, module: nn.Module, given: dict[str, Any]) -> Frame:
        """In a ``generate`` that is followed whole: rows come in as it has made them."""
        trace = outer.trace
        assert trace is not None
        batch = [
            t for value in self.inputs.batch(module, given) for t in tensors_of(value) if t.dim()
        ]
        rows: tuple[int, ...] | None = None
        for t in batch:
            o = trace.owners(t)
            if o is not None and o.size == o.shape[0] and (o >= 0).all():
                rows = tuple(int(i) for i in o.reshape(-1)) * (t.shape[0] if o.size == 1 else 1)
                break
        if rows is None:
            return Frame(self, module, outer.rows, trace).within(outer)
        for t in batch:
            if trace.owners(t) is None and t.shape[0] == len(rows):
                trace.marks.set(t, along(0, rows, t.dim()))
        known = rows_of_inputs(module, given)
        for name, of_ids in (known or {}).items():
            t = given[name]
            trace.marks.set(t, along(0, [rows[i] for i in of_ids], t.dim()))
        return Frame(self, module, rows, trace).within(outer)

    def _state(
        self,
        frame: Frame,
        module: nn.Module,
        statement: Statement,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        rows = frame.rows if statement.rows is None else statement.rows
        sizes = []
        for t in tensors_of([args, kwargs]):
            if t.dim() <= statement.dim:
                continue
            sizes.append(t.shape[statement.dim])
            if statement.rows is not None and sizes[-1] == len(rows) * self.routing.copies:
                rows = tuple(i for i in rows for _ in range(self.routing.copies))
            known = None if frame.trace is None else frame.trace.owners(t)
            # What has come from the batch is known better than by its length.
            known = known is not None and bool((known >= 0).all())
            if sizes[-1] == len(rows) and frame.trace is not None and not known:
                frame.trace.marks.set(t, along(statement.dim, rows, t.dim()))
        frame.stated.append((statement, rows))
        if statement.rows is not None and len(rows) not in sizes:
            raise RuntimeError(
                f"adapter_rows[{self.name(module)!r}]: expected the batch row of each of its "
                f"{sizes[0] if sizes else 0} rows, got {len(statement.rows)}"
            )


def _entries(root: nn.Module, layers: Iterable[nn.Module] | None) -> list[nn.Module]:
    encoder = encoder_of(root)
    found = [root] if encoder is None else [root, encoder]
    if layers is not None:
        inside = {id(layer) for layer in layers}
        found += [
            m for m in root.modules()
            if id(m) not in inside and any(id(each) in inside for each in m.modules())
        ]  # fmt: skip
    return found
