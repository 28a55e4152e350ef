"""Watch over a model: where a batch comes in its rows are marked, and followed to the layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastlora.inspection.wrappers import unwrap
from fastlora.rows.eager_stance import EagerStance
from fastlora.rows.frame import Frame
from fastlora.rows.hooks import EnterHook, LeaveHook
from fastlora.rows.image_rows import find_image_rows
from fastlora.rows.inputs import Inputs, find_encoder
from fastlora.rows.outer_frame import OuterFrame
from fastlora.rows.owners import spread_along
from fastlora.rows.signature import (
    count_rows,
    find_tensors,
)
from fastlora.rows.statements import Statement, find_modules
from fastlora.rows.tracing import Trace
from fastlora.rows.verdicts import Verdicts


class Watch:
    """Hooks on the modules of one model, which open and close frames; for all threads.

    routing: the batch's, which may be one a thread. layers: the batch may come in at any module
    that contains one of these, not only at the model and its encoder.
    """

    def __init__(
        self, model: nn.Module, routing: Any, layers: Iterable[nn.Module] | None = None
    ) -> None:
        self.root = unwrap(model)
        self.routing = routing
        self.verdicts = Verdicts(self.root)
        self.inputs = Inputs(self.root)
        # Whether every layer has seen the batch first in all forwards; None before the first.
        self.plain: bool | None = None
        for module in _find_entries(self.root, layers):
            self.add_hooks(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["verdicts"], dict):  # 0.1.0 had their parts here
            names = ("root", "routing", "inputs", "plain")
            state = {name: state[name] for name in names} | {"verdicts": Verdicts(state["root"])}
        vars(self).update(state)

    def add_hooks(self, module: nn.Module) -> None:
        hooks = module._forward_pre_hooks.values()
        if not any(isinstance(hook, EnterHook) and hook.watch is self for hook in hooks):
            module.register_forward_pre_hook(EnterHook(self), with_kwargs=True)
            module.register_forward_hook(LeaveHook(self), always_call=True)

    def remove_hooks(self) -> None:
        """Takes back what ``hook`` has done, everywhere."""
        for module in self.root.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if isinstance(hook, (EnterHook, LeaveHook)) and hook.watch is self:
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
                        module._forward_hooks_always_called.pop(key, None)

    def hook_stated(self, statements: Mapping[str, Statement]) -> dict[int, Statement]:
        """Hooks the modules that statements are about; returns the statements by module id."""
        modules = find_modules(self.root) if statements else {}
        for name in statements:
            self.add_hooks(modules[name])
        return {id(modules[name]): each for name, each in statements.items()}

    def get_name(self, module: nn.Module) -> str:
        names = {id(m): name for name, m in find_modules(self.root).items()}
        return names.get(id(module), type(module).__name__)

    # --- a module begins and ends ---

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = self.routing
        frame = routing.frame
        if frame is None:
            routing.frame = self._open_frame(module, self.inputs.bind(module, args, kwargs))
            frame = routing.frame
        elif frame.module is module:
            frame.depth += 1
        elif frame.module is None:
            routing.frame = frame = self._nest_frame(
                frame, module, self.inputs.bind(module, args, kwargs)
            )
        statement = routing.stated.get(id(module)) if routing.stated else None
        if statement is not None and frame.trace is not None:
            self._mark_stated(frame, module, statement, args, kwargs)

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
            self.routing.close_frames()

    def _open_frame(self, module: nn.Module, inputs: dict[str, Any]) -> Frame:
        routing = self.routing
        statement = routing.stated.get(id(module)) if routing.stated else None
        dim = 0 if statement is None else statement.dim
        batch = self.inputs.find_batch(module, inputs)
        rows = count_rows(batch, dim)
        count = len(routing.slots)
        if rows is not None and rows not in {count, count * routing.copies}:
            raise routing.make_count_error(count, rows)
        copies = 1 if rows is None or not count else rows // count
        owners = tuple(i for i in range(count) for _ in range(copies))
        if routing.uniform or rows is None:
            return OuterFrame(self, module, owners, None if routing.uniform else Trace())
        key = None
        image_rows = find_image_rows(module, inputs) if dim == 0 else None
        if image_rows is None and not any(s.rows for s in routing.stated.values()):
            key = self.verdicts.make_key(module, owners, inputs, routing.stated)
            places = None if key is None else self.verdicts.find(key)
            if places is not None:
                return OuterFrame(self, module, owners, None, places)
        trace = Trace()
        for value in batch:
            for t in find_tensors(value):
                if t.dim() > dim and t.shape[dim] == rows:
                    trace.marks.set(t, spread_along(dim, owners, t.dim()))
        for name, rows_of_images in (image_rows or {}).items():
            t = inputs[name]
            trace.marks.set(t, spread_along(0, [owners[i] for i in rows_of_images], t.dim()))
        return OuterFrame(self, module, owners, trace, keep=key)

    def note_first(self, plain: bool) -> None:
        """Notes whether a forward has shown every layer the batch's rows, first and in order."""
        self.plain = plain and self.plain is not False

    @contextmanager
    def follow_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Follows a call of the model, which may be compiled once its rows are known."""
        self.enter(self.root, args, kwargs)
        try:
            yield
        except BaseException:
            self.routing.close_frames()
            raise
        self.leave(self.root, True)

    @contextmanager
    def follow_tokens(self, ids: Tensor) -> Iterator[None]:
        """Follows a call in which every token is a row: layers must see ids (1, T) in order."""
        trace, order = Trace(), tuple(range(ids.shape[1]))
        trace.marks.set(ids, spread_along(1, order, 2))
        self.routing.frame = OuterFrame(self, None, order, trace)
        try:
            yield
        finally:
            self.routing.close_frames()

    @contextmanager
    def run_first_eagerly(self) -> Iterator[None]:
        """Runs the first call of a batch as it was written, where later ones may be compiled."""
        routing, stance = self.routing, EagerStance()
        routing.batch_is_first = bool(self.plain)
        if not self.plain and not routing.uniform:
            stance.begin()
        try:
            yield
        finally:
            stance.end()

    @contextmanager
    def follow_generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Follows a call of the model's ``generate``, which may do more than forwards of the batch.

        transformers' own keeps all rows to the end, copies side by side; any other is followed from
        begin to end, and that one to its first forward where images are its rows' by their tokens.
        """
        routing = self.routing
        function = getattr(getattr(self.root, "generate", None), "__func__", None)
        is_transformers = getattr(function, "__module__", None) == "transformers.generation.utils"
        is_plain = is_transformers and kwargs.get("custom_generate") is None
        inputs = dict(zip(("input_ids", "generation_config"), args, strict=False)) | kwargs
        image_rows = find_image_rows(self.root, inputs)
        if not routing.uniform and (image_rows is not None or not is_plain):
            routing.frame = self._open_whole(args, inputs, image_rows or {}, is_plain)
        try:
            yield
        finally:
            routing.close_frames()

    def _open_whole(
        self,
        args: tuple[Any, ...],
        inputs: dict[str, Any],
        image_rows: Mapping[str, Any],
        once: bool,
    ) -> Frame:
        count, trace = len(self.routing.slots), Trace()
        for t in find_tensors(self.inputs.find_batch(self.root, inputs) or list(args[:1])):
            if t.dim() and t.shape[0] == count:
                trace.marks.set(t, spread_along(0, range(count), t.dim()))
        for name, rows in image_rows.items():
            trace.marks.set(inputs[name], spread_along(0, rows, inputs[name].dim()))
        return OuterFrame(self, None, tuple(range(count)), trace, once=once)

    def _nest_frame(self, outer: Frame, module: nn.Module, inputs: dict[str, Any]) -> Frame:
        """Opens a frame in a ``generate`` that is followed whole: rows are as it has made them."""
        trace = outer.trace
        assert trace is not None
        batch = [
            t
            for value in self.inputs.find_batch(module, inputs)
            for t in find_tensors(value)
            if t.dim()
        ]
        rows: tuple[int, ...] | None = None
        for t in batch:
            o = trace.owners_of(t)
            if o is not None and o.size == o.shape[0] and (o >= 0).all():
                rows = tuple(int(i) for i in o.reshape(-1)) * (t.shape[0] if o.size == 1 else 1)
                break
        if rows is None:
            return Frame(self, module, outer.rows, trace).nest_in(outer)
        for t in batch:
            if trace.owners_of(t) is None and t.shape[0] == len(rows):
                trace.marks.set(t, spread_along(0, rows, t.dim()))
        image_rows = find_image_rows(module, inputs)
        for name, rows_of_images in (image_rows or {}).items():
            t = inputs[name]
            trace.marks.set(t, spread_along(0, [rows[i] for i in rows_of_images], t.dim()))
        return Frame(self, module, rows, trace).nest_in(outer)

    def _mark_stated(
        self,
        frame: Frame,
        module: nn.Module,
        statement: Statement,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        rows = frame.rows if statement.rows is None else statement.rows
        sizes = []
        for t in find_tensors([args, kwargs]):
            if t.dim() <= statement.dim:
                continue
            sizes.append(t.shape[statement.dim])
            if statement.rows is not None and sizes[-1] == len(rows) * self.routing.copies:
                rows = tuple(i for i in rows for _ in range(self.routing.copies))
            owners = None if frame.trace is None else frame.trace.owners_of(t)
            # What has come from the batch is known better than by its length.
            is_known = owners is not None and bool((owners >= 0).all())
            if sizes[-1] == len(rows) and frame.trace is not None and not is_known:
                frame.trace.marks.set(t, spread_along(statement.dim, rows, t.dim()))
        frame.stated.append((statement, rows))
        if statement.rows is not None and len(rows) not in sizes:
            raise RuntimeError(
                f"adapter_rows[{self.get_name(module)!r}]: expected the batch row of each of its "
                f"{sizes[0] if sizes else 0} rows, got {len(statement.rows)}"
            )


def _find_entries(root: nn.Module, layers: Iterable[nn.Module] | None) -> list[nn.Module]:
    encoder = find_encoder(root)
    entries = [root] if encoder is None else [root, encoder]
    if layers is not None:
        inside = {id(layer) for layer in layers}
        entries += [
            m for m in root.modules()
            if id(m) not in inside and any(id(each) in inside for each in m.modules())
        ]  # fmt: skip
    return entries
