"""Styles for torch's ``parallelize_module``."""

from fastlora.model.tensor_parallel import ColwiseParallel, RowwiseParallel

__all__ = ["ColwiseParallel", "RowwiseParallel"]
