"""Routing: which rows of the running batch are which adapter's, grouped once for all layers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlora import functional as F
from fastlora.rows.frame import Frame, Place
from fastlora.rows.owners import Owners
from fastlora.rows.statements import Statement

# What a batch sets while it runs.
_BATCH_FIELDS = (
    "num_slots", "slots", "slot_array", "nobody", "uniform", "copies", "per_token", "groups",
    "scales", "expanded_scales", "frame", "stated", "places", "batch_is_first",
)  # fmt: skip


class Routing:
    """Slots of the rows of the batch that is running, grouped once a step; -1 = no adapter.

    - outside: what to do, in the error of a layer that runs while no batch does
    - watched: whether a ``Watch`` says where the batch comes in; if not, layers are called with it
    - recomputes: whether layers may run once more in a backward
    """

    watched = False
    recomputes = False
    advice = (
        "state it: adapter_rows={{'{0}': [...]}}, the batch row of each, or batch_dims={{'{0}': 0}}"
        " where they are the batch in order; or leave the layer out with exclude_modules"
    )

    def __init__(self, outside: str) -> None:
        self.outside = outside
        self.num_slots = 0
        self.slots: Tensor | None = None
        self.slot_array: Any = None
        self.nobody = self.uniform = False
        self.copies = 1
        self.per_token = False
        self.groups: list[F.RowGroups] = []
        self.scales: Tensor | None = None
        self.expanded_scales: list[Tensor] = []
        self.frame: Frame | None = None
        self.stated: dict[int, Statement] = {}
        # Whether compiled code may take the batch to be first.
        self.batch_is_first = False
        # Places by the layers that have run in this batch; None: not each time the same.
        self.places: dict[int, Any] = {}

    @contextmanager
    def run_batch(
        self,
        slots: list[int],
        num_slots: int,
        copies: int = 1,
        scales: Sequence[float] | None = None,
        per_token: bool = False,
        stated: Mapping[int, Statement] | None = None,
    ) -> Iterator[None]:
        """Runs a batch: row i goes through ``slots[i]``, and so do its ``copies`` (beams, samples).

        scales: numbers that row i's adapter part is multiplied by. per_token: a row is a token,
        wherever the layers' inputs break lines: (1, T, K), (T, K). stated: of modules, by id.
        """
        before = {name: getattr(self, name) for name in _BATCH_FIELDS}
        self.num_slots, self.copies, self.groups, self.expanded_scales = num_slots, copies, [], []
        self.per_token, self.frame, self.places = per_token, None, {}
        self.nobody = not any(slot >= 0 for slot in slots)
        self.uniform = len(set(slots)) <= 1 and len(set(scales or ())) <= 1 and not per_token
        self.stated = dict(stated or {})
        with torch.inference_mode(False):
            self.slots = torch.tensor(slots, dtype=torch.int32)
            self.slot_array = np.asarray(slots, np.int32)
            self.scales = None if scales is None else torch.tensor(scales, dtype=torch.float32)
        try:
            yield
        finally:
            self.close_frames()
            for name, value in before.items():
                setattr(self, name, value)

    def close_frames(self) -> None:
        """Ends what an error has left open."""
        while self.frame is not None:
            self.frame.close()
            self.frame = self.frame.outer

    def find_rows(self, x: Tensor, layer: nn.Module | None = None) -> Place | Owners | None:
        """Finds where a layer's input x (..., K) has the batch's rows, or the owner of each of its.

        None: all are one adapter's. Raises RuntimeError where it is not known.
        """
        if self.slots is None:
            raise RuntimeError(f"no adapters were named: {self.outside}")
        if self.per_token:
            if x.dim() < 2 or math.prod(x.shape[:-1]) != len(self.slots):
                raise self._make_unknown_error(
                    x, layer, "it sees other rows than the step has tokens"
                )
            if self.frame is not None and layer is not None:
                place = self.frame.find_rows(layer, x)
                if not isinstance(place, Place):
                    name = self.frame.get_name(layer)
                    raise RuntimeError(f"{name}: it does not see the tokens in their order")
            return Place(0, 1)
        frame = self.frame
        if torch.compiler.is_compiling():
            if self.uniform:
                return None
            if self.watched and not (self.batch_is_first if frame is None else frame.plain):
                raise self._make_unknown_error(
                    x, layer, "compiled code takes the batch to be first"
                )
            return Place(0, 1)
        if frame is not None:
            if self.uniform:
                return None
            assert layer is not None
            place = frame.find_rows(layer, x)
            if isinstance(place, str):
                raise self._make_unknown_error(x, layer, place)
            if self.recomputes:
                self._remember(layer, place)
            return place
        if torch._C._current_graph_task_id() != -1 and self.watched:
            return None if self.uniform else self._find_again(x, layer)
        if self.watched and not _is_called_by_hand():
            raise self._make_unknown_error(x, layer, "it was reached past the model's own call")
        count = len(self.slots)
        if x.dim() < 2 or x.shape[0] not in (count, count * self.copies):
            raise RuntimeError(
                f"x: expected {count} rows first, one an adapter name, got shape "
                f"{tuple(x.shape)}: adapter_names has another number of names than the batch has "
                "rows, or this layer does not see the batch; then leave it out with exclude_modules"
            )
        return None if self.uniform else Place(0, x.shape[0] // max(count, 1))

    def _remember(self, layer: nn.Module, place: Place | Owners) -> None:
        before = self.places.setdefault(id(layer), place)
        if before is not place and not _is_same_place(before, place):
            self.places[id(layer)] = None

    def _find_again(self, x: Tensor, layer: nn.Module | None) -> Place | Owners:
        """Returns what its forward found, for a layer that runs once more in a backward."""
        place = self.places.get(id(layer))
        if place is None:
            reason = "it ran with other rows in turn, and which of them a backward has is not known"
            raise self._make_unknown_error(
                x, layer, reason if id(layer) in self.places else self.outside
            )
        return place

    def _make_unknown_error(self, x: Tensor, layer: nn.Module | None, reason: str) -> RuntimeError:
        is_framed = self.frame is not None and layer is not None
        name = self.frame.get_name(layer) if is_framed else getattr(layer, "key", "x")  # pyright: ignore
        owner = name.rpartition(".")[0] or name
        return RuntimeError(
            f"{name}: whose the rows of its input {tuple(x.shape)} are is not known (this layer "
            f"does not see the batch: {reason}); {self.advice.format(owner)}"
        )

    def make_count_error(self, names: int, rows: int) -> Exception:
        """Makes the error for another number of names than the batch has rows."""
        return RuntimeError(
            f"x: expected {names} rows first, one an adapter name, got {rows}: adapter_names has "
            "another number of names than the batch has rows"
        )

    def prepare_groups(self, x: Tensor, layer: nn.Module) -> tuple[F.RowGroups, Tensor | None]:
        """Makes groups and scales once a forward that sees its rows as before."""
        frame = self.frame
        if torch.compiler.is_compiling() or frame is None or not frame.plain:
            rows = self.find_rows(x, layer)
            return self.make_groups(rows, x), self.make_scales(rows, x)
        lead = x.shape[:-1]
        if self.uniform or (id(layer) in frame.places and lead[0] == len(frame.rows)):
            prepared = frame.groups_and_scales.get((lead, x.device))
            if prepared is not None:
                return prepared
        rows = self.find_rows(x, layer)
        prepared = self.make_groups(rows, x), self.make_scales(rows, x)
        frame.groups_and_scales[lead, x.device] = prepared
        return prepared

    def group_input(self, x: Tensor, layer: nn.Module | None = None) -> F.RowGroups:
        """Groups a layer's input x (..., K), whose first dimensions are rows and tokens."""
        return self.make_groups(self.find_rows(x, layer), x)

    def make_groups(self, place: Place | Owners | None, x: Tensor) -> F.RowGroups:
        """Makes the groups of what ``find_rows`` has found for x."""
        lead = tuple(x.shape[:-1])
        owners = self._owners(place, lead)
        assert self.slots is not None
        if owners is not None:
            ids = torch.from_numpy(self.slot_array[owners].reshape(-1))
            with torch.inference_mode(False):
                groups = F.group_rows(ids.to(x.device), self.num_slots)
            return replace(groups, shape=lead, nobody=self.nobody)
        slots, rows, count = self.slots, math.prod(lead), len(self.slots)
        if place is None:
            slots, count = slots[:1], min(count, 1)
        # Searched, not looked up: under torch.compile a key would hold the batch to one size.
        for groups in self.groups:
            if groups.ids.shape[0] == rows and groups.ids.device == x.device:
                return replace(groups, shape=lead)
        # What is made in inference mode cannot be saved for backward.
        with torch.inference_mode(False):
            groups = F.group_rows(slots.to(x.device), self.num_slots)
            groups = replace(groups.repeat(rows // count if count else 1), nobody=self.nobody)
        self.groups.append(groups)
        return replace(groups, shape=lead)

    def make_scales(self, place: Place | Owners | None, x: Tensor) -> Tensor | None:
        """Makes row_scales for a layer's input x (..., K): one a row, or None where all are 1."""
        if self.scales is None:
            return None
        lead = tuple(x.shape[:-1])
        owners = self._owners(place, lead)
        if owners is not None:
            return self.scales[torch.from_numpy(owners).long()].to(x.device)
        scales, rows, count = self.scales, math.prod(lead), len(self.scales)
        if place is None:
            scales, count = scales[:1], min(count, 1)
        for expanded in self.expanded_scales:
            if expanded.shape[0] == rows and expanded.device == x.device:
                return expanded.view(lead)
        with torch.inference_mode(False):
            scales = scales.to(x.device).repeat_interleave(rows // count if count else 1)
        self.expanded_scales.append(scales)
        return scales.view(lead)

    def _owners(self, place: Place | Owners | None, lead: tuple[int, ...]) -> Owners | None:
        """Returns an owner for each row and token; None where the batch's rows in order say it."""
        # Numbers of rows are not looked at in compiled code, which is for any.
        if place is None or torch.compiler.is_compiling():
            return None
        if isinstance(place, Place):
            frame = self.frame
            if place.dim == 0 and (
                frame is None or (frame.regular and frame.count == len(self.slot_array))
            ):
                return None
            rows = np.arange(len(self.slot_array)) if frame is None else np.asarray(frame.rows)
            shape = [1] * len(lead)
            shape[place.dim] = -1
            place = np.repeat(rows, place.copies).astype(np.int32).reshape(shape)
        return np.broadcast_to(place, lead).copy()


def _is_same_place(a: Any, b: Any) -> bool:
    if isinstance(a, Place) or isinstance(b, Place) or a is None:
        return a == b if isinstance(a, Place) and isinstance(b, Place) else False
    return a.shape == b.shape and bool((a == b).all())


def _is_called_by_hand() -> bool:
    """Whether the layer that runs was called by no module around it."""
    frame: Any = sys._getframe(2)
    inside = True
    while frame is not None:
        name = frame.f_code.co_filename
        inside = inside and ("/fastlora/" in name or "/torch/" in name)
        code = frame.f_code
        caller = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if not inside and isinstance(caller, nn.Module):
            return False
        frame = frame.f_back
    return True
