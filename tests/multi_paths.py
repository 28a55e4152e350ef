"""The paths of the Triton kernels for many adapters, for the tests of each."""

import pytest
import torch

from fastlora.kernels import choice, launch
from fastlora.kernels.ledger import MULTI_PATHS, Problem

paths = pytest.mark.parametrize("path", [path for path in MULTI_PATHS if path != "added"])


def needs_path(path: str, dtype: torch.dtype, device: torch.device) -> None:
    problem = Problem(1, 1, 1, 1, dtype.itemsize, slots=1)
    if not choice.possible(path, problem, launch.arch_of(device), dtype == torch.float16):
        pytest.skip(f"{path} does not run such a product here")
