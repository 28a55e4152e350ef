"""Where a batch comes into a model: its rows are marked, and what is found of them is kept.

A forward whose inputs look like an earlier one's, and in which no value of a tensor decided on
anybody's rows, is not followed again if all layers saw the batch's rows in order.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.rows.eagerly import Eagerly
from fastlora.rows.frame import Frame, Place
from fastlora.rows.known_models import rows_of_inputs
from fastlora.rows.owners import along
from fastlora.rows.repeatable import all_trusted, state_of
from fastlora.rows.statements import Statement, modules_by_name
from fastlora.rows.tracing import Trace
from fastlora.wrapping import unwrapped

# Inputs of a model whose first dimension is the batch, by the contract of whoever calls it.
_BATCH = (
    "input_ids",
    "inputs_embeds",
    "inputs",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "labels",
    "encoder_hidden_states",
    "encoder_outputs",
    "hidden_states",
    "hidden_state",
    "x",
    "input",
)
_KEPT = 256


class Watch:
    """What the modules of one model say when a batch comes in and leaves; every thread's.

    routing: of the thread that asks. layers: where the batch may come in at any module that
    contains one of these, not only at the model and its encoder.
    """

    def __init__(
        self, model: nn.Module, routing: Any, layers: Iterable[nn.Module] | None = None
    ) -> None:
        self.root = unwrapped(model)
        self.routing = routing
        self.verdicts: dict[Any, dict[int, Place]] = {}
        # {signature without lengths: (what was found last, what was found of two lengths)}
        self.lengths: dict[Any, tuple[Any, dict[int, Place] | None]] = {}
        self._parameters: dict[type, list[str]] = {}
        self._trusted: bool | None = None
        # Whether every layer has seen the batch first in all forwards; None before the first.
        self.plain: bool | None = None
        for module in _entries(self.root, layers):
            self.hook(module)

    def __getstate__(self) -> dict[str, Any]:
        # By the ids of modules, which a copy has others of.
        return vars(self) | {"verdicts": {}, "lengths": {}}

    def hook(self, module: nn.Module) -> None:
        hooks = module._forward_pre_hooks.values()
        if not any(isinstance(hook, _Opening) and hook.watch is self for hook in hooks):
            module.register_forward_pre_hook(_Opening(self), with_kwargs=True)
            module.register_forward_hook(_Closing(self), always_call=True)

    def remove(self) -> None:
        """Takes back what ``hook`` has done, everywhere."""
        for module in self.root.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if isinstance(hook, (_Opening, _Closing)) and hook.watch is self:
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
            routing.frame = self._opened(module, self._bound(module, args, kwargs))
            frame = routing.frame
        elif frame.module is module:
            frame.depth += 1
        elif frame.module is None:
            routing.frame = frame = self._nested(frame, module, self._bound(module, args, kwargs))
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
        batch = self._batch(module, given)
        rows = _rows_in(batch, dim)
        count = len(routing.slots)
        if rows is not None and rows not in {count, count * routing.copies}:
            raise routing.miscounted(count, rows)
        copies = 1 if rows is None or not count else rows // count
        owners = tuple(i for i in range(count) for _ in range(copies))
        if routing.uniform or rows is None:
            return _Open(self, module, owners, None if routing.uniform else Trace())
        key = None
        known = rows_of_inputs(module, given) if dim == 0 else None
        if known is None and not any(s.rows for s in routing.stated.values()):
            key = self._key(module, owners, given)
            found = None if key is None else self.verdicts.get(key) or self.of_any_length(key)
            if found is not None:
                return _Open(self, module, owners, None, found)
        trace = Trace()
        for value in batch:
            for t in _tensors(value):
                if t.dim() > dim and t.shape[dim] == rows:
                    trace.marks.set(t, along(dim, owners, t.dim()))
        for name, of_ids in (known or {}).items():
            t = given[name]
            trace.marks.set(t, along(0, [owners[i] for i in of_ids], t.dim()))
        return _Open(self, module, owners, trace, keep=key)

    def proved(self, plain: bool) -> None:
        """Whether a forward has shown every layer the batch's rows, first and in order."""
        self.plain = plain and self.plain is not False

    @contextmanager
    def called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Around a call of the model, which may be compiled: what has to be known is found before."""
        self.enter(self.root, args, kwargs)
        try:
            yield
        except BaseException:
            self.routing.leave()
            raise
        self.leave(self.root, True)

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
        state = () if self._trusted else state_of(self.root)
        if state is None:
            return None
        stated = tuple(self.routing.stated)
        return id(module), module.training, owners, stated, state, _signature(given)

    def of_any_length(self, key: Any) -> dict[int, Place] | None:
        """What two texts' lengths have had in common, if they had all."""
        return self.lengths.get((key[:-1], _loosely(key[-1])), (0, None))[1]

    def keep(self, key: Any, found: dict[int, Place]) -> None:
        for kept in (self.verdicts, self.lengths):
            while len(kept) >= _KEPT:
                kept.pop(next(iter(kept)), None)
        self.verdicts[key] = found
        loose = (key[:-1], _loosely(key[-1]))
        if self._trusted and loose[1] is not None:
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
        for t in _tensors(self._batch(self.root, given) or list(args[:1])):
            if t.dim() and t.shape[0] == count:
                trace.marks.set(t, along(0, range(count), t.dim()))
        for name, rows in known.items():
            trace.marks.set(given[name], along(0, rows, given[name].dim()))
        return _Open(self, None, tuple(range(count)), trace, once=once)

    def _nested(self, outer: Frame, module: nn.Module, given: dict[str, Any]) -> Frame:
        """In a ``generate`` that is followed whole: rows come in as it has made them."""
        trace = outer.trace
        assert trace is not None
        batch = [t for value in self._batch(module, given) for t in _tensors(value) if t.dim()]
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
        for t in _tensors([args, kwargs]):
            if t.dim() <= statement.dim:
                continue
            sizes.append(t.shape[statement.dim])
            if statement.rows is not None and sizes[-1] == len(rows) * self.routing.copies:
                rows = tuple(i for i in rows for _ in range(self.routing.copies))
            if sizes[-1] == len(rows) and frame.trace is not None:
                frame.trace.marks.set(t, along(statement.dim, rows, t.dim()))
        frame.stated.append((statement, rows))
        if statement.rows is not None and len(rows) not in sizes:
            raise RuntimeError(
                f"adapter_rows[{self.name(module)!r}]: expected the batch row of each of its "
                f"{sizes[0] if sizes else 0} rows, got {len(statement.rows)}"
            )

    # --- its inputs ---

    def _bound(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if not args:
            return kwargs
        names = self._names_of(module)
        names = [*names[: len(args)], *(f"*{i}" for i in range(len(names), len(args)))]
        return dict(zip(names, args, strict=True)) | kwargs

    def _names_of(self, module: nn.Module) -> list[str]:
        kind = type(module)
        names = self._parameters.get(kind)
        if names is None:
            names = self._parameters[kind] = list(inspect.signature(kind.forward).parameters)[1:]
        return names

    def _batch(self, module: nn.Module, given: dict[str, Any]) -> list[Any]:
        """Inputs that are the batch, the main one first."""
        names = [getattr(self.root, "main_input_name", None)]
        if module is _encoder(self.root):
            names.append(getattr(module, "main_input_name", None))
        found = [given[name] for name in dict.fromkeys([*names, *_BATCH]) if _given(given, name)]
        # A part of a model of transformers may be given images, which are no rows of its batch.
        if found or (names[0] in self._names_of(self.root)):
            return found
        first = next((t for t in given.values() if isinstance(t, Tensor) and t.dim()), None)
        return [] if first is None else [first]


class _Open(Frame):
    """A frame of its own, whose trace begins and ends with it."""

    def __init__(
        self,
        watch: Watch,
        module: object,
        rows: tuple[int, ...],
        trace: Trace | None,
        found: dict[int, Place] | None = None,
        keep: Any = None,
        once: bool = False,
    ) -> None:
        super().__init__(watch, module, rows, trace, found)
        self._keep, self.once = keep, once
        self._eagerly = Eagerly()
        if not self.plain:
            self._eagerly.begin()
        if trace is not None:
            trace.open()

    def close(self, output: Any = None) -> None:
        self._eagerly.end()
        trace, self.trace = self.trace, None
        if trace is None:
            return
        trace.close()
        if output is None:
            return
        lasting = bool(self._keep) and self.usual and not trace.by_value
        if lasting:
            self.watch.keep(self._keep, self.found)
        self.watch.proved(lasting and all(place == (0, 1) for place in self.found.values()))


class _Opening:
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        routing = self.watch.routing
        if routing.slots is None or routing.per_token or _in_backward():
            return
        self.watch.enter(module, args, kwargs)


class _Closing:
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.watch.routing.slots is None or _in_backward():
            return
        self.watch.leave(module, output)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _entries(root: nn.Module, layers: Iterable[nn.Module] | None) -> list[nn.Module]:
    encoder = _encoder(root)
    found = [root] if encoder is None else [root, encoder]
    if layers is not None:
        inside = {id(layer) for layer in layers}
        found += [
            m for m in root.modules()
            if id(m) not in inside and any(id(each) in inside for each in m.modules())
        ]  # fmt: skip
    return found


def _encoder(root: nn.Module) -> nn.Module | None:
    """What generate calls before the model."""
    config = getattr(root, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(root, "get_encoder"):
        return None
    found = root.get_encoder()  # pyright: ignore[reportCallIssue]
    return found if isinstance(found, nn.Module) and found is not root else None


def _given(given: Mapping[str, Any], name: str | None) -> bool:
    return name is not None and given.get(name) is not None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in _tensors(part)]
    return []


def _rows_in(batch: list[Any], dim: int) -> int | None:
    for value in batch:
        for t in _tensors(value):
            if t.dim() > dim:
                return t.shape[dim]
    return None


def _signature(given: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a forward's way can depend on, values apart.

    While one token a row is decoded, how long the cache and its mask have become is left out.
    """
    main = given.get("decoder_input_ids", given.get("input_ids"))
    decoding = (
        isinstance(main, Tensor)
        and main.shape[-1] == 1
        and given.get("past_key_values") is not None
    )
    return tuple((name, _looks(value, decoding)) for name, value in given.items())


def _loosely(signature: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Without the lengths of texts; None for other inputs than texts."""
    found = []
    for name, look in signature:
        if isinstance(look, tuple) and isinstance(look[0], torch.dtype):
            if len(look[1]) != 2 or look[0].is_floating_point:
                return None
            look = (look[0], look[1][:1])
        found.append((name, look))
    return tuple(found)


def _looks(value: Any, decoding: bool) -> Any:
    if isinstance(value, Tensor):
        shape = (value.dim(), value.shape[:1]) if decoding else value.shape
        return value.dtype, shape
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return int if decoding else value
    if isinstance(value, Mapping):
        return type(value), tuple((str(k), _looks(v, decoding)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_looks(v, decoding) for v in value)
    return type(value), _cached(value)


def _cached(value: Any) -> Any:
    """Whether a cache holds something, and which parts of an encoder's are known."""
    length = getattr(value, "get_seq_length", None)
    crossed = getattr(value, "is_updated", None)
    begun = bool(length()) if callable(length) else None
    return begun, tuple(crossed.values()) if isinstance(crossed, dict) else None


def copies_in(model: nn.Module, options: Mapping[str, Any]) -> int:
    """How many neighbours ``generate`` makes of a row: its beams, or the texts it returns."""
    config = options.get("generation_config") or getattr(
        unwrapped(model), "generation_config", None
    )
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(config, name, None) or 1 for name in names)
