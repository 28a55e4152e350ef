"""Several adapters of one layer combined into one, with the names and the results of PEFT's
``add_weighted_adapter``.

Shapes: lora_A (R, K), lora_B (N, R); an adapter's delta is ``scaling * lora_B @ lora_A`` (N, K).
The result's scaling is 1: weights and scalings have gone into its factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.adapters.prune import MAJORITIES, METHODS, sum_pruned
from fastlora.backends.dtypes import FLOATS
from fastlora.config import check_number, check_rank
from fastlora.functional.receipt import Adapter

PRUNED = tuple(name for name in METHODS if name != "linear")
TYPES = ("svd", "cat", "linear", *PRUNED, *(f"{name}_svd" for name in PRUNED))

_DRIVERS = (None, "gesvd", "gesvdj", "gesvda")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = False,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Adapter:
    """Combines several adapters of the same layer into one; none of them is changed.

    adapters: ``(lora_A (R, K), lora_B (N, R), scaling)`` each, float16 to float64, on one device.
    weights: a finite number each, negative ones subtract; s below is weight * scaling.

    combination_type:

    - ``svd``: the best approximation of rank svd_rank to the sum of ``s * B @ A``; from a QR of the
      stacked factors, without a tensor of N * K elements
    - ``cat``: that sum itself; ranks add up
    - ``linear``: sums ``sqrt|s| * B`` and ``sign(s) * sqrt|s| * A``, so that B @ A has cross terms
    - ``magnitude_prune``: linear, of factors of which the largest entries are kept
    - ``dare_linear``: linear, of factors of which random entries are kept and enlarged
    - ``ties``, ``dare_ties``: the same two with elected signs, a mean over the adapters that agree
    - ``…_svd``: these four on the dense deltas instead of the factors, then svd. Pruned deltas have
      no factors: one layer's deltas (N, K) exist meanwhile, one at a time or, where signs are
      elected, all adapters'

    svd_rank: at most this rank; None: the largest among the adapters. svd_clamp: limits every
    number of the svd's factors to this quantile of them, in [0, 1]. svd_full_matrices: how
    ``torch.linalg.svd`` treats a dense delta; the result is the same. svd_driver: its algorithm on
    CUDA. density: share of entries kept, in [0, 1], above 0 where the kept are enlarged; required
    by what prunes. majority_sign_method: a number's sign is that of the sum ("total") or that of
    most adapters ("frequency").

    svd, cat and …_svd take adapters of different ranks, the others of one. A single adapter is
    scaled by the rule of linear, whatever the type, as PEFT does.

    Computed in float32, svd and float64 adapters in float64; returned in the adapters' dtype.
    Random entries are drawn from torch's generator, every lora_A in turn, then every lora_B.

    Raises TypeError or ValueError naming the argument; ValueError too for numbers that are not
    finite or do not fit the dtype. After Yadav et al. 2023 (ties), Yu et al. 2023 (dare).
    """
    combination = Combination(
        combination_type,
        svd_rank,
        svd_clamp,
        svd_full_matrices,
        svd_driver,
        density,
        majority_sign_method,
    )
    check_weights(weights, "adapters", adapters)
    for index, adapter in enumerate(adapters):
        check_adapter(f"adapters[{index}]", adapter)
    return combination.for_count(len(adapters)).apply(adapters, weights)


@dataclass(frozen=True)
class Combination:
    """Settings of ``combine``, checked; good for any number of layers."""

    combination_type: str
    svd_rank: int | None
    svd_clamp: float | None
    svd_full_matrices: bool
    svd_driver: str | None
    density: float | None
    majority_sign_method: str

    def __post_init__(self) -> None:
        _check_choice("combination_type", self.combination_type, TYPES)
        _check_choice("svd_driver", self.svd_driver, _DRIVERS)
        _check_choice("majority_sign_method", self.majority_sign_method, MAJORITIES)
        if self.svd_rank is not None:
            check_rank("svd_rank", self.svd_rank)
        if not isinstance(self.svd_full_matrices, bool):
            raise TypeError(f"svd_full_matrices: expected a bool, got {self.svd_full_matrices!r}")
        _check_share("svd_clamp", self.svd_clamp)
        _check_share("density", self.density)
        method = self.method
        if method in PRUNED and self.density is None:
            raise ValueError(f"density: {self.combination_type} needs a number in [0, 1], got None")
        if method.startswith("dare") and self.density == 0:
            raise ValueError(f"density: {self.combination_type} divides by it, got 0")

    @property
    def method(self) -> str:
        """The type without ``_svd``."""
        return self.combination_type.removesuffix("_svd")

    def for_count(self, count: int) -> Combination:
        """Returns the settings for so many adapters: a single one is merely scaled."""
        return replace(self, combination_type="linear") if count == 1 else self

    def apply(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """Combines adapters that each fulfil ``check_adapter``, as ``combine`` does."""
        self._check_together(adapters)
        dtype = adapters[0][0].dtype
        for A, B, _ in adapters:
            dtype = torch.promote_types(dtype, torch.promote_types(A.dtype, B.dtype))
        # Factors that nearly cancel leave a small core of large numbers: its SVD takes float64.
        least = torch.float64 if self.combination_type == "svd" else torch.float32
        wide = torch.promote_types(dtype, least)
        with torch.no_grad():
            widened = [(A.to(wide), B.to(wide), float(s)) for A, B, s in adapters]
            A, B = self._compute_factors(widened, [float(weight) for weight in weights])
            A, B = A.to(dtype), B.to(dtype)
            _check_fits(A, B)
        return A, B, 1.0

    def _compute_factors(
        self, adapters: Sequence[Adapter], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        if self.combination_type == "cat":
            return _stack(adapters, weights)
        if self.combination_type in METHODS:
            # A weight belongs to the product: each factor takes its root, one of them its sign.
            shares = [weight * s for (_, _, s), weight in zip(adapters, weights, strict=True)]
            roots = [math.sqrt(abs(share)) for share in shares]
            signed = [math.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
            A = self._sum_pruned((A for A, _, _ in adapters), signed)
            return A, self._sum_pruned((B for _, B, _ in adapters), roots)
        rank = self.svd_rank or max(A.shape[0] for A, _, _ in adapters)
        if self.combination_type == "svd":
            A, B = self._svd_of_factors(*_stack(adapters, weights), rank)
        else:
            delta = self._sum_pruned(((B @ A).mul_(s) for A, B, s in adapters), weights)
            A, B = self._svd_of_dense(delta, rank)
        return self._clamp(A, B)

    def _sum_pruned(self, tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
        density = 1.0 if self.density is None else self.density
        method = METHODS[self.method]
        return sum_pruned(method, tensors, weights, density, self.majority_sign_method)

    def _svd_of_factors(self, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Cuts B @ A (N, K) to a rank, A (R, K), B (N, R): the SVD is of an (R, R) core."""
        _check_fits(A, B)
        Q_B, R_B = torch.linalg.qr(B)  # (N, R), (R, R)
        Q_A, R_A = torch.linalg.qr(A.T)  # (K, R), (R, R)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False, driver=self.svd_driver)
        return Vh[:rank] @ Q_A.T, Q_B @ (U[:, :rank] * S[:rank])

    def _svd_of_dense(self, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        _check_fits(delta)
        U, S, Vh = torch.linalg.svd(
            delta, full_matrices=self.svd_full_matrices, driver=self.svd_driver
        )
        return Vh[:rank].clone(), U[:, :rank] * S[:rank]  # a view would keep all of Vh alive

    def _clamp(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        if self.svd_clamp is None:
            return A, B
        limit = float(torch.quantile(torch.cat([B.flatten(), A.flatten()]), self.svd_clamp))
        if limit < 0:
            raise ValueError(
                f"svd_clamp: expected a quantile that limits magnitudes, got {self.svd_clamp}, "
                f"which is {limit:g} here"
            )
        return A.clamp(-limit, limit), B.clamp(-limit, limit)

    def _check_together(self, adapters: Sequence[Adapter]) -> None:
        shapes = {(B.shape[0], A.shape[1]) for A, B, _ in adapters}
        if len(shapes) > 1:
            raise ValueError(
                f"adapters: expected deltas of one shape (N, K), got {_list_sorted(shapes)}"
            )
        devices = {t.device for A, B, _ in adapters for t in (A, B)}
        if len(devices) > 1:
            raise ValueError(f"adapters: expected one device, got {_list_sorted(devices)}")
        if self.svd_driver is not None and next(iter(devices)).type != "cuda":
            raise ValueError(f"svd_driver: CUDA alone has drivers, got {self.svd_driver!r}")
        ranks = [A.shape[0] for A, _, _ in adapters]
        if self.combination_type in METHODS and len(set(ranks)) > 1:
            raise ValueError(
                f"combination_type: {self.combination_type} needs adapters of one rank, got ranks "
                f"{ranks}; svd, cat and the types that end in _svd take different ones"
            )


def check_weights(weights: Sequence[float], name: str, items: Sequence[object]) -> None:
    """Raises unless there is a finite number for each of ``given``, and at least one."""
    if isinstance(items, (str, Tensor)) or not isinstance(items, Sequence):
        raise TypeError(f"{name}: expected a list, got {type(items).__name__}")
    if isinstance(weights, (str, Tensor)) or not isinstance(weights, Sequence):
        raise TypeError(f"weights: expected a list of numbers, got {type(weights).__name__}")
    if not items:
        raise ValueError(f"{name}: expected at least one, got none")
    if len(weights) != len(items):
        raise ValueError(
            f"weights: expected one for each of {len(items)} {name}, got {len(weights)}"
        )
    for index, weight in enumerate(weights):
        check_number(f"weights[{index}]", weight)


def check_adapter(name: str, adapter: object) -> None:
    """Raises unless it is a well-formed ``(lora_A, lora_B, scaling)`` of finite numbers."""
    if not isinstance(adapter, Sequence) or len(adapter) != 3:
        raise TypeError(f"{name}: expected (lora_A, lora_B, scaling), got {type(adapter).__name__}")
    A, B, scaling = adapter
    check_number(f"{name}: scaling", scaling)
    for part, t in (("lora_A", A), ("lora_B", B)):
        if not isinstance(t, Tensor) or t.dtype not in FLOATS:
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: {part}: expected a tensor of float16 to float64, got {kind}")
    if A.dim() != 2 or B.dim() != 2 or B.shape[1] != A.shape[0] or not A.shape[0]:
        raise ValueError(
            f"{name}: expected lora_A (R, K) and lora_B (N, R) with R at least 1, got "
            f"{tuple(A.shape)} and {tuple(B.shape)}"
        )
    for part, t in (("lora_A", A), ("lora_B", B)):
        if not t.isfinite().all():
            raise ValueError(f"{name}: {part}: expected finite numbers, got NaN or infinity")


def _stack(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Stacks A (R, K) and B (N, R) of all adapters; R is the sum of ranks, A bears the weights."""
    A = [A * weight * s for (A, _, s), weight in zip(adapters, weights, strict=True)]
    return torch.cat(A), torch.cat([B for _, B, _ in adapters], dim=1)


def _check_fits(*results: Tensor) -> None:
    """Raises for infinity and NaN, before torch's decompositions do so in other words."""
    for t in results:
        if not t.isfinite().all():
            raise ValueError(f"weights: the combined adapter would not fit {t.dtype}: overflow")


def _check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")


def _check_share(name: str, value: float | None) -> None:
    if value is None:
        return
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def _list_sorted(values: set) -> str:
    return ", ".join(sorted(map(str, values)))
