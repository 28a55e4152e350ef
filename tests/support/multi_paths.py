"""The paths of the Triton kernels for many adapters, as a parameter of tests."""

from collections.abc import Callable

import pytest
import torch

from fastlora.kernels.choose import choice
from fastlora.kernels.choose.ledger import MULTI_PATHS, Problem
from fastlora.kernels.tile import launch
from tests.thinning import skip_where


def reason_path_does_not_run(
    path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> str | None:
    problem = Problem(1, 1, 1, 1, dtype.itemsize, slots=1)
    first = dtype == torch.float16
    here = choice.possible(path, problem, launch.arch_of(device), first)
    return None if here else f"{path} does not run such a product here"


def on_every_path(test: Callable[..., None]) -> Callable[..., None]:
    """Along every path that runs on the device, in the dtype."""
    every = [path for path in MULTI_PATHS if path != "added"]
    return pytest.mark.parametrize("path", every)(skip_where(reason_path_does_not_run)(test))
