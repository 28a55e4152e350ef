"""Wrappers around a model and its modules: torch.compile's, data parallelism's, checkpointing's."""

from __future__ import annotations

from torch import nn

# Where wrappers keep the module that they wrap: torch.compile's, checkpoint_wrapper's, FSDP1's.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside wrappers of ``torch.compile``, data parallelism, checkpointing."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        # By their attributes: naming torch.compile's class would import all of the compiler.
        wrapped = (model._modules.get(name) for name in _WRAPPED)
        inner = next((module for module in wrapped if module is not None), None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def strip_wrappers(name: str) -> str:
    """Leaves wrappers inside the model out of a module's full name, as files do."""
    if not any(wrapped in name for wrapped in _WRAPPED):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)
