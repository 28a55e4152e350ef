"""Training several adapters on one base: whose each row of a batch is, and what is each one's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from fastlora import gathering
from fastlora.injection import training_rows
from fastlora.multi_modules import trained_layers


@contextmanager
def use_adapters(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside the block row i of the batch goes through ``adapter_names[i]``; None is the base.

    For models of ``replace_linear(..., adapter_names=)``. Each adapter gets the gradients that its
    rows alone would give it; one without rows gets none (DistributedDataParallel then needs
    ``find_unused_parameters=True``; under ``fully_shard`` every process must enter, and an adapter
    with rows in another one gets zeros from here). The batch is every layer's first dimension.
    Where activations are checkpointed, layers run once more in backward, which belongs into its
    forward's block: of two batches that share their layers, each into its own.

    Raises TypeError when the names are no list, ValueError for one that the model does not have,
    RuntimeError for other models, and while another thread is in such a block of this model.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names: expected a list with a name a row, got {adapter_names!r}")
    with training_rows(model).named(adapter_names, gathering.anywhere(model)):
        yield model


def adapter_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The parameters of one of several adapters, for an optimizer or a gradient norm of its own.

    lora_A (R, K) and lora_B (N, R) of every layer, in the model's order. Raises ValueError for a
    name that the model does not have, RuntimeError for a model without several adapters.
    """
    training_rows(model).index(adapter_name)
    layers = [layer for _, layer in trained_layers(model)]
    return [p for layer in layers for p in layer.adapter_parameters(adapter_name).values()]
