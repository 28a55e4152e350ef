"""``LoRAConfig``: which layers get LoRA and how, in PEFT's field names and file format."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fastlora.config import matching, refusals

# Fields of a PEFT config that describe the file or tune what is refused anyway: any value passes.
_DESCRIPTIVE = frozenset(
    {"auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version"}
    | {"qalora_group_size", "revision", "runtime_config"}
)
_BIASES = ("none", "all", "lora_only")
# What PEFT's model of a task trains whole, whether its config says so or not.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_INITS = ("gaussian", "orthogonal", "olora", "pissa")
_NITER = re.compile(r"pissa_niter_(\d+)")
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of ``replace_linear``, by PEFT's names and with PEFT's defaults.

    - r, lora_alpha: rank and numerator of ``scaling = lora_alpha / r`` (``/ sqrt(r)`` with
      use_rslora)
    - lora_dropout: probability on the LoRA branch
    - lora_bias: a trained bias beside lora_B
    - bias: which biases of the base train and are saved: "none", "all" or "lora_only"
    - target_modules, exclude_modules: names, matched whole or after a dot, or one regular
      expression matched in full; target_modules may be "all-linear": every ``nn.Linear`` and
      transformers' ``Conv1D`` but the output embedding
    - layers_to_transform: only layers of this index, or these, of the names after a dot
    - layers_pattern: what the list of layers is called, by default anything
    - rank_pattern, alpha_pattern: {name or regular expression: value} that override r and
      lora_alpha; the first key that matches counts
    - modules_to_save: modules whose name ends so are trained and saved whole, as a copy
    - fan_in_fan_out: what PEFT's files say of ``Conv1D``; each layer's own kind decides
    - init_lora_weights: True (lora_B zero), "gaussian" (likewise), "orthogonal", False (lora_B
      random, for tests), or one that moves a part of the base's weight into the adapter: "pissa",
      "pissa_niter_16" (by 16 iterations instead of an exact decomposition), "olora"

    Raises TypeError or ValueError naming the field. References: Hu et al. 2021; rsLoRA:
    Kalajdzievski 2023; PiSSA: Meng et al. 2024; OLoRA: Büyükakyüz 2024.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_layer(self.r, self.lora_alpha, self.lora_dropout)
        if str(self.init_lora_weights).lower() in ("gaussian", "olora"):  # in PEFT of any case
            object.__setattr__(self, "init_lora_weights", str(self.init_lora_weights).lower())
        check_init(self.init_lora_weights)
        if self.bias not in _BIASES:
            raise ValueError(f"bias: expected one of {', '.join(_BIASES)}, got {self.bias!r}")
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, matching.check_names_or_regex(name, getattr(self, name)))
        for name in ("use_rslora", "lora_bias", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            raise ValueError(
                f"init_lora_weights: PEFT reads no {self.init_lora_weights!r} together with "
                "lora_bias, only True and False"
            )
        for key, value in self.rank_pattern.items():
            check_rank(f"rank_pattern[{key!r}]", value)
        for key, value in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{key!r}]", value)
        for key in (*self.rank_pattern, *self.alpha_pattern):
            matching.check_regex("rank_pattern or alpha_pattern", key)
        object.__setattr__(
            self, "layers_to_transform", matching.check_indices(self.layers_to_transform)
        )
        object.__setattr__(self, "layers_pattern", matching.check_patterns(self.layers_pattern))
        object.__setattr__(self, "modules_to_save", matching.check_modules(self.modules_to_save))
        self._check_layers()

    def _check_layers(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(self.target_modules, str) and value is not None:
                raise ValueError(
                    f"{name}: expected a list of names as target_modules beside it, got "
                    f"{self.target_modules!r}"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern: expected layers_to_transform beside it, got "
                f"{self.layers_pattern!r} alone"
            )

    def excludes(self, name: str) -> bool:
        """Whether exclude_modules names it, or it is in what modules_to_save trains whole."""
        if self.exclude_modules is not None and matching.is_match(self.exclude_modules, name):
            return True
        return matching.is_within(self.modules_to_save or (), name)

    def targets(self, name: str) -> bool:
        """Whether the module of this full name is asked for ("all-linear" is not a name: False)."""
        if self.target_modules is None or self.all_linear:
            return False
        matches = matching.is_match(self.target_modules, name)
        # A full name stands for itself, in whatever layer.
        if not matches or self.layers_to_transform in (None, ()) or name in self.target_modules:
            return matches
        patterns, layers = self.layers_pattern or (), self.layers_to_transform
        index = matching.find_layer_index(
            name, (patterns,) if isinstance(patterns, str) else patterns
        )
        return index == layers if isinstance(layers, int) else index in (layers or ())

    def names(self, linear: str) -> bool:
        """Whether a linear layer of this full name gets LoRA."""
        return not self.excludes(linear) and (self.all_linear or self.targets(linear))

    def saves(self, name: str) -> bool:
        """Whether the module of this full name is trained and saved whole."""
        return matching.ends_with_any(self.modules_to_save or (), name)

    def check_plain(self, whose: str) -> None:
        """Raises ValueError where there is more than lora_A and lora_B beside the base as it is."""
        if self.lora_bias or self.bias != "none":
            raise ValueError(
                f"config: {whose} has biases of its own, got lora_bias={self.lora_bias}, "
                f"bias={self.bias!r}"
            )
        if self.modules_to_save:
            raise ValueError(
                f"config: {whose} trains modules whole, got modules_to_save="
                f"{list(self.modules_to_save)}"
            )
        if has_split_base(self.init_lora_weights):
            raise ValueError(
                f"config: {whose} wants another base, which init_lora_weights="
                f"{self.init_lora_weights!r} leaves"
            )

    def with_heads(self) -> LoRAConfig:
        """Adds the heads to modules_to_save that PEFT's model of this task_type trains whole."""
        return replace(self, modules_to_save=(*(self.modules_to_save or ()), *self.heads) or None)

    @property
    def heads(self) -> tuple[str, ...]:
        """What heads are called in models of this task_type, each of which may have another."""
        return _HEADS.get(self.task_type or "", ())

    @property
    def all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def rank_of(self, name: str) -> int:
        return matching.look_up(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return matching.look_up(self.alpha_pattern, name, self.lora_alpha)

    def scaling_of(self, name: str) -> float:
        return compute_scaling(self.alpha_of(name), self.rank_of(name), self.use_rslora)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields of PEFT's ``adapter_config.json``."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"peft_type": "LORA", "inference_mode": True, **values}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LoRAConfig:
        """Reads PEFT's fields; those fastlora does not have pass when null, false or empty."""
        kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
        if kind not in (None, "LORA"):
            raise ValueError(f"peft_type: expected LORA, got {kind!r}")
        field_names = {f.name for f in fields(LoRAConfig)}
        refused = {
            k: v
            for k, v in values.items()
            if k not in field_names | _DESCRIPTIVE and not _is_empty(v)
        }
        if refused:
            raise ValueError(
                f"config: fastlora does not support {refusals.describe_fields(refused)}"
            )
        task = values.get("task_type")
        supported = {key: values[key] for key in field_names & set(values)}
        return LoRAConfig(**{**supported, "task_type": getattr(task, "value", task)})

    @staticmethod
    def of(config: object) -> LoRAConfig:
        """Returns a LoRAConfig as is, a ``peft.LoraConfig`` translated; else raises TypeError."""
        if isinstance(config, LoRAConfig):
            return config
        LoRAConfig.check_pefts(config)
        return LoRAConfig.from_dict(config.to_dict())  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def check_pefts(config: object) -> None:
        """Raises TypeError for what is no ``peft.LoraConfig``."""
        # By name, so that peft need not be installed, let alone imported, to say no.
        if any(base.__name__ == "LoraConfig" for base in type(config).__mro__):
            return
        raise TypeError(
            f"config: expected fastlora.LoRAConfig or peft.LoraConfig, got {type(config).__name__}"
        )


def compute_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def check_rank(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number of 1 or more, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a whole number of 1 or more, got {value}")


def check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    # Not math.isfinite, which cannot look at an integer beyond float64's range.
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number, got {value!s:.40}")


def check_dropout(value: object) -> None:
    check_number("lora_dropout", value)
    if not 0.0 <= value <= 1.0:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"lora_dropout: expected a probability in [0, 1], got {value}")


def check_layer(r: object, lora_alpha: object, lora_dropout: object) -> None:
    """Raises unless r, lora_alpha and lora_dropout can be a layer's."""
    check_rank("r", r)
    check_number("lora_alpha", lora_alpha)
    check_dropout(lora_dropout)


def check_init(value: object) -> None:
    name = value if isinstance(value, str) else ""
    reason = next(
        (because for init, because in refusals.INITS.items() if name.startswith(init)), None
    )
    if reason is not None:
        raise ValueError(f"init_lora_weights: fastlora does not support {value!r}: {reason}")
    if not isinstance(value, bool) and value not in _INITS and parse_iterations(value) is None:
        known = ", ".join(f'"{init}"' for init in _INITS)
        raise ValueError(
            f'init_lora_weights: expected True, False, {known} or "pissa_niter_[number]", got '
            f"{value!r}"
        )


def parse_iterations(init: object) -> int | None:
    """Returns n of "pissa_niter_n"; None for anything else."""
    match = _NITER.fullmatch(init) if isinstance(init, str) else None
    return int(match[1]) if match else None


def has_split_base(init: object) -> bool:
    """Whether ``init_lora_weights`` takes a part out of the base's weight into the adapter."""
    return init in ("pissa", "olora") or parse_iterations(init) is not None


def _is_empty(value: object) -> bool:
    # 0 equals False, but layers_to_transform=0 names a layer.
    return value is None or value is False or value in ("", [], {}, ())
