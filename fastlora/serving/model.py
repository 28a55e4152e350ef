"""``MultiLoRAModel``: one base model, many adapters, any mix of them in one batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import files
from fastlora.config import LoRAConfig, check_rank
from fastlora.inspection import first_forward
from fastlora.inspection.layers import is_linear
from fastlora.inspection.wrappers import unwrap
from fastlora.model.targets import make_plan
from fastlora.modules.replacement import replace_module
from fastlora.rows.inputs import count_copies
from fastlora.rows.statements import Statement, check_dims, check_rows
from fastlora.rows.watch import Watch
from fastlora.serving.bank.bank import AdapterBank
from fastlora.serving.bank.entry import Read
from fastlora.serving.batch import Batch, count_rows
from fastlora.serving.engine.engine import Engine, stream
from fastlora.serving.engine.request import Event, Request
from fastlora.serving.files import AdapterFiles, AdapterSource, AdapterTensors, Reader
from fastlora.serving.layer import ServedLinear, check_no_experts, layout_of
from fastlora.serving.protocol import BASE


class MultiLoRAModel(nn.Module):
    """A model whose linears add each row's own adapter, of any number that a bank knows.

    - model: any batch-first torch model, changed in place: the linears that target_modules names
      (as in ``LoRAConfig``) share their weights with layers that read adapters from ``bank``
    - max_adapters: how many are on the device at a time, so how many different ones a batch has
    - max_rank: of an adapter in any layer
    - device_bytes: of pages for adapters; None is enough for max_adapters of max_rank. An adapter
      takes what its own layers and ranks need, in steps of eight ranks
    - host_bytes: of copies in the host's memory; others are read again when they are needed
    - lora_dtype: of the pages; None is the weights'
    - batch_dims: {module: dimension along which its inputs have the batch, in the caller's order},
      for modules to which the batch cannot be followed (learned queries); "" is the model itself

    Inference only: calls run without gradients.

    All methods may be called from any thread, while batches run in others. A batch keeps the
    adapters that it began with. Moving or casting the model takes the bank along, at the next call.

    Raises ValueError, the model unchanged, when nothing matches or a named layer cannot serve:
    besides what ``replace_linear`` refuses, experts of a mixture, whose rows are not the batch's.
    """

    def __init__(
        self,
        model: nn.Module,
        max_adapters: int = 8,
        max_rank: int = 16,
        target_modules: str | Sequence[str] = "all-linear",
        *,
        exclude_modules: str | Sequence[str] | None = None,
        lora_dtype: torch.dtype | None = None,
        device_bytes: int | None = None,
        host_bytes: int = 4 << 30,
        batch_dims: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self._batch_dims = check_dims(model, batch_dims)
        check_rank("max_adapters", max_adapters)
        check_rank("max_rank", max_rank)
        targets, excluded = (
            names if isinstance(names, str) or names is None else tuple(names)
            for names in (target_modules, exclude_modules)
        )
        chosen = make_plan(model, LoRAConfig(target_modules=targets, exclude_modules=excluded))
        check_no_experts(chosen.linears)
        linears = {name: linear for name, (linear, _) in chosen.linears.items()}
        self.max_adapters, self.max_rank, self.lora_dtype = max_adapters, max_rank, lora_dtype
        layout = layout_of(linears, max_rank, lora_dtype)
        self.bank = AdapterBank(
            layout, max_adapters, device_bytes=device_bytes, host_bytes=host_bytes
        )
        self._reader = Reader(
            unwrap(model),
            {name: (layer.N, layer.K) for name, layer in layout.layers.items()},
            frozenset(n for n, m in unwrap(model).named_modules() if is_linear(m)),
            max_rank,
        )
        self._batch = Batch("call the MultiLoRAModel, not the model in it")
        self._layers = {
            name: ServedLinear.serve(linear, name, self.bank, self._batch)
            for name, linear in linears.items()
        }
        for name, layer in self._layers.items():
            replace_module(model, chosen.linears[name][1], layer)
        self.rows = Watch(model, self._batch)
        self.model = model
        self.skipped = chosen.skipped
        first_forward.watch(model)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self.bank.names

    def load_adapter(
        self, directory: str | os.PathLike[str], adapter_name: str, *, pin: bool = False
    ) -> None:
        """Loads PEFT's files from ``directory``; a name that is loaded already is replaced.

        Batches that run keep the old one. The new one is on the device when this returns if there
        is room, else when a batch first needs it. pin: keep it there. The files must stay: they are
        read again when the host's copy has made room for others.

        Raises ValueError or FileNotFoundError, nothing changed, as ``fastlora.load_adapter`` does,
        and for a rank above max_rank, an adapter larger than device_bytes, a layer that is not
        served, lora_bias and trained biases, modules_to_save, an init_lora_weights that has split
        the base's weights, or rows of the embeddings that are not this base's (another vocabulary).
        """
        folder = os.path.abspath(files.as_folder(directory))
        self._add(adapter_name, lambda: AdapterFiles(folder, self._reader), pin)

    def _add(self, adapter_name: str, source: Callable[[], Read], pin: bool) -> None:
        files.check_name(adapter_name)
        if adapter_name == BASE:
            raise ValueError(f"adapter_name: {BASE!r} means the base model")
        self.follow()
        self.bank.add(adapter_name, source())
        if pin:
            self.bank.pin(adapter_name)

    def load_adapter_from_tensors(
        self,
        tensors: Mapping[str, Tensor],
        config: LoRAConfig | Mapping[str, Any],
        adapter_name: str,
        *,
        pin: bool = False,
    ) -> None:
        """Loads an adapter that is in memory: of a training loop beside the server, say.

        tensors: {PEFT's name: tensor}, as ``adapter_state_dict`` or PEFT's
        ``get_peft_model_state_dict`` gives them; copied, so that the next step may change them.
        They stay in the host's memory beside ``host_bytes``, since no file has them. config: a
        LoRAConfig, PEFT's LoraConfig, or the fields of its file.

        Replaces, pins and raises as ``load_adapter`` does, and TypeError for what is no tensor or
        no config. Batches that begin after it returns have all of the new one, rank and scaling
        too; those that run keep all of the old one.
        """
        self._add(adapter_name, lambda: AdapterTensors(self._reader.take(tensors, config)), pin)

    def load_adapter_from_source(
        self,
        source: Callable[[], tuple[Mapping[str, Tensor], LoRAConfig | Mapping[str, Any]]],
        adapter_name: str,
        *,
        pin: bool = False,
    ) -> None:
        """Loads an adapter that ``source`` reads: the tensors and the config, as
        ``load_adapter_from_tensors`` takes them.

        It is called now, and again in the loading thread when the host's copy has made room for
        others; what it gives then must be the same. Replaces, pins and raises as
        ``load_adapter_from_tensors`` does, besides what ``source`` raises.
        """
        self._add(adapter_name, lambda: AdapterSource(source, self._reader), pin)

    def unload_adapter(
        self, adapter_name: str, *, wait: bool = False, timeout: float | None = None
    ) -> None:
        """Forgets an adapter and zeroes its pages.

        wait: whether to wait for the batches that use it, at most ``timeout`` seconds; no other
        batch gets it from the call on. Raises ValueError when it is not loaded, RuntimeError,
        nothing changed, when it is in use and wait is false, TimeoutError.
        """
        self.bank.remove(adapter_name, wait=wait, timeout=timeout)

    def pin_adapter(self, adapter_name: str) -> None:
        """Keeps an adapter on the device until ``unpin_adapter``; others make room.

        Raises ValueError when it is not loaded, RuntimeError where pinned ones leave no room.
        """
        self.bank.pin(adapter_name)

    def unpin_adapter(self, adapter_name: str) -> None:
        """Undoes ``pin_adapter``; ValueError when it is not pinned."""
        self.bank.unpin(adapter_name)

    @torch.no_grad()
    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str | None],
        adapter_scales: Sequence[float] | None = None,
        adapter_rows: Mapping[str, Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """``model(*args, **kwargs)``, row i through ``adapter_names[i]``, without gradients.

        None and ``"__base__"`` name the base model; adapter_scales multiplies row i's adapter part
        by the i-th number. The batch is the first dimension of ``input_ids``, ``inputs_embeds`` or
        ``inputs``, else of the first tensor. From there rows are followed to the layers, through
        whatever the model makes of them. adapter_rows: {module: the batch row of each of its rows},
        for those that come in another way. Waits where an adapter is not on the device.

        Raises TypeError when the names are no list, ValueError for an unknown one, more different
        ones than max_adapters, scales that are not finite, or when they are not one a row of the
        batch; RuntimeError where pinned adapters leave no room, for a layer whose rows cannot be
        followed, or what reading an adapter raised.
        """
        routed = self._route(adapter_names, adapter_scales, adapter_rows, args, kwargs)
        with routed, self.rows.follow_call(args, kwargs):
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str | None],
        adapter_scales: Sequence[float] | None = None,
        adapter_rows: Mapping[str, Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """``model.generate(*args, **kwargs)`` with an adapter a row, beams and samples included.

        Rows, names, scales and errors as in ``forward``; beams and returned sequences are their
        row's.
        """
        model: Any = self.model
        copies = count_copies(model, kwargs)
        routed = self._route(adapter_names, adapter_scales, adapter_rows, args, kwargs, copies)
        with routed, self.rows.follow_generate(args, kwargs), self.rows.run_first_eagerly():
            return model.generate(*args, **kwargs)

    def engine(self, **options: Any) -> Engine:
        """Returns an ``Engine`` over this server, whose batch requests join and leave.

        options: as ``Engine``'s.
        """
        return Engine(self, **options)

    def stream(self, requests: Iterable[Request], **options: Any) -> Iterator[Event]:
        """Yields events of all requests, each with its own adapter, as their tokens come.

        Requests are taken from the iterable when there is room: twice ``max_rows`` are under way,
        of which half wait. Options, and errors of the model, as ``Engine``'s; an error of one
        request is that request's event, and the others go on. Closing the iterator cancels them.
        """
        return stream(self, requests, **options)

    @contextmanager
    def running(
        self,
        slots: Sequence[int],
        scales: Sequence[float] | None = None,
        copies: int = 1,
        per_token: bool = False,
        stated: Mapping[str, Statement] | None = None,
    ) -> Iterator[None]:
        """Within, this thread's batch has row i in ``slots[i]`` of a lease of the bank's, -1: none.

        For a caller that runs ``self.model`` itself and holds the lease meanwhile. scales: one a
        row, of its adapter's part. copies: how many neighbouring rows a layer may see in place of
        one. per_token: every token is a row, wherever its sequence begins and ends. stated: which
        of the batch's rows modules see.
        """
        by_module = self.rows.hook_stated(self._batch_dims if stated is None else stated)
        with self._batch.run_batch(
            list(slots), self.max_adapters, copies, scales, per_token, by_module
        ):
            yield

    @contextmanager
    def _route(
        self,
        adapter_names: Sequence[str | None],
        adapter_scales: Sequence[float] | None,
        adapter_rows: Mapping[str, Sequence[int]] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        copies: int = 1,
    ) -> Iterator[None]:
        """Within, this thread's batch has the adapters that a call names, leased meanwhile."""
        dims = self._batch_dims
        rows = count_rows(adapter_names, adapter_scales, args, kwargs, dims)
        stated = dims | check_rows(self.model, adapter_rows, rows, dims)
        self.follow()
        of_adapters = [name for name in adapter_names if name not in (None, BASE)]
        with self.bank.borrow(of_adapters) as lease:
            leased = iter(lease.slots)
            slots = [-1 if name in (None, BASE) else next(leased) for name in adapter_names]
            with self.running(slots, adapter_scales, copies, stated=stated):
                yield

    def follow(self) -> None:
        """Takes the bank to where the layers are now, as every call does that needs adapters.

        Raises RuntimeError, nothing changed, where it is elsewhere and adapters are in use.
        """
        moved = [layer for layer in self._layers.values() if layer.moved]
        if moved:
            layout = layout_of(self._layers, self.max_rank, self.lora_dtype)
            if layout.layers != self.bank.layout.layers:
                self.bank.rebuild(layout)
            for layer in moved:
                layer.moved = False
