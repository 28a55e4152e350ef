"""Marks on living tensors: owners of their elements, kept by the memory they lie in.

By memory: autograd hands views on as other tensors than an op returned, and what is written
through one view is read through another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora.rows.owners import MIXED, NOBODY, Owners, compress, fill_owner

# The owners of views that are nobody's; they fit any shape.
NONE: Owners = fill_owner(NOBODY, 0)


class _Memory:
    """Owners of the views of one storage. elements: of its every element, once that is needed."""

    __slots__ = ("elements", "itemsize", "ref", "views")

    def __init__(self, ref: StorageWeakRef, itemsize: int) -> None:
        self.ref, self.itemsize = ref, itemsize
        self.views: dict[Any, Owners] = {}
        self.elements: Owners | None = None

    def expand(self, size: int) -> Owners:
        if self.elements is not None and len(self.elements) != size:  # resized
            self.views.clear()
            self.elements = np.full(size, MIXED, np.int32)
        if self.elements is None:
            self.elements = np.full(size, NOBODY, np.int32)
            for (offset, shape, stride, itemsize), o in self.views.items():
                if itemsize == self.itemsize:
                    _view(self.elements, offset, shape, stride)[...] = o
        return self.elements


class Marks:
    """Owners of tensors. A storage that is gone keeps its place: its number comes no more."""

    def __init__(self) -> None:
        self._memories: dict[int, _Memory] = {}
        self._next_sweep = 4096

    def get(self, t: Tensor) -> Owners | None:
        """Returns the owners of a tensor, None for nobody's."""
        storage = _storage(t)
        if storage is None:
            return None
        memory = self._memories.get(storage._cdata)
        if memory is None:
            return None
        place = (t.storage_offset(), tuple(t.shape), t.stride(), t.itemsize)
        owners = memory.views.get(place)
        if owners is None:
            if memory.itemsize != t.itemsize:
                return fill_owner(MIXED, t.dim())
            elements = memory.expand(storage.nbytes() // t.itemsize)
            owners = memory.views[place] = compress(_view(elements, *place[:3]).copy())
            if owners.size and (owners == NOBODY).all():
                owners = memory.views[place] = NONE
        return None if owners is NONE else owners

    def set(self, t: Tensor, owners: Owners | None) -> None:
        """Notes the owners of what an op has returned: a new tensor, or another view of one."""
        storage = _storage(t)
        if storage is None:
            return
        memory = self._memories.get(storage._cdata)
        if memory is None:
            if owners is None:
                return
            memory = self._add(storage, t.itemsize)
        place = (t.storage_offset(), tuple(t.shape), t.stride(), t.itemsize)
        memory.views[place] = NONE if owners is None else owners

    def write(self, t: Tensor, owners: Owners | None) -> None:
        """Notes the owners of what was written into ``t``, as every view of its memory shows it."""
        storage = _storage(t)
        if storage is None:
            return
        before = self.get(t)
        if owners is before or (owners is None and before is None):
            return
        memory = self._memories.get(storage._cdata) or self._add(storage, t.itemsize)
        o = NONE if owners is None else owners
        place = (t.storage_offset(), tuple(t.shape), t.stride(), t.itemsize)
        if memory.itemsize != t.itemsize:
            o = fill_owner(MIXED, t.dim())
            memory.views = {key: fill_owner(MIXED, len(key[1])) for key in memory.views}
        elif memory.views.keys() - {place} or t.numel() * t.itemsize != storage.nbytes():
            elements = memory.expand(storage.nbytes() // t.itemsize)
            _view(elements, *place[:3])[...] = o
            memory.views.clear()
        else:
            memory.elements = None
        memory.views[place] = o

    def _add(self, storage: Any, itemsize: int) -> _Memory:
        if len(self._memories) >= self._next_sweep:
            live = {key: m for key, m in self._memories.items() if not m.ref.expired()}
            self._memories, self._next_sweep = live, max(4096, 2 * len(live))
        memory = self._memories[storage._cdata] = _Memory(StorageWeakRef(storage), itemsize)
        return memory


def _storage(t: Tensor) -> Any:
    try:
        return t.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse, or wrapped by a transform
        return None


def _view(elements: Owners, offset: Any, shape: tuple[int, ...], stride: tuple[int, ...]) -> Owners:
    steps = [step * elements.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(elements[offset:], shape, steps)
