"""Training of several adapters on one base: each row's adapter, and each adapter's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from fastlora.model.record import get_injection, get_training_rows
from fastlora.modules import dtensors
from fastlora.modules.trained import find_trained_layers
from fastlora.rows.statements import check_dims, check_rows


@contextmanager
def use_adapters(
    model: nn.Module,
    adapter_names: Sequence[str | None],
    *,
    adapter_rows: Mapping[str, Sequence[int]] | None = None,
    batch_dims: Mapping[str, int] | None = None,
) -> Iterator[nn.Module]:
    """Sends row i of the batch through ``adapter_names[i]`` inside the block; None is the base.

    - model: of ``replace_linear(..., adapter_names=)``
    - adapter_rows: {name of a module: the batch row of each of its rows}
    - batch_dims: {name of a module: the dimension along which its inputs have the batch}

    The batch is the first dimension of what the model is called with. The owners of a layer's rows
    are followed from there, or stated by adapter_rows and batch_dims, as in ``MultiLoRAModel``.
    Each adapter gets the gradients that its rows alone would give it; one without rows gets none.
    DistributedDataParallel then needs ``find_unused_parameters=True``. Under ``fully_shard`` every
    process must enter, and an adapter with rows in another process gets zeros from here.

    Where activations are checkpointed, layers run once more in backward: run it in the block of its
    forward, also where two batches share their layers. A compiled model runs its first block as it
    was written, not compiled.

    Raises TypeError when the names are no list, ValueError for a name that the model does not have
    and for a statement about no module or no row. Raises RuntimeError for other models, for a layer
    whose rows' owners are not known, and while another thread is in such a block of this model.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names: expected a list with a name a row, got {adapter_names!r}")
    dims = check_dims(model, batch_dims)
    stated = dims | check_rows(model, adapter_rows, len(adapter_names), dims)
    rows, watch = get_training_rows(model), get_injection(model).watch
    assert watch is not None
    running = rows.run_named(
        adapter_names, dtensors.make_any_flags(model), watch.hook_stated(stated)
    )
    with running, watch.run_first_eagerly():
        yield model


def adapter_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """Lists one adapter's parameters, for an optimizer or a gradient norm of its own.

    lora_A (R, K) and lora_B (N, R) of every layer, in the model's order. Raises ValueError for a
    name that the model does not have, RuntimeError for a model without several adapters.
    """
    get_training_rows(model).index(adapter_name)
    layers = [layer for _, layer in find_trained_layers(model)]
    return [p for layer in layers for p in layer.adapter_parameters(adapter_name).values()]
