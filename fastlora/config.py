"""``LoRAConfig``: which layers get LoRA and how, in PEFT's field names and file format."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Fields of a PEFT config that describe the file or tune what is refused anyway: any value passes.
_DESCRIPTIVE = frozenset(
    {"auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version"}
    | {"qalora_group_size", "revision", "runtime_config"}
)
_BIASES = ("none", "all", "lora_only")
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class LoRAConfig:
    """What ``replace_linear`` does, by PEFT's names and with PEFT's defaults.

    r, lora_alpha: rank and numerator of ``scaling = lora_alpha / r`` (``/ sqrt(r)`` with
    use_rslora). lora_dropout: probability on the LoRA branch. lora_bias: a trained bias beside
    lora_B. bias: which biases of the base train and are saved: "none", "all" or "lora_only".
    target_modules, exclude_modules: names (matched whole or after a dot), or one regular expression
    matched in full; target_modules may be "all-linear": every ``nn.Linear`` but the output
    embedding. rank_pattern, alpha_pattern: {name or regular expression: value} that override r and
    lora_alpha. init_lora_weights: True (lora_B zero), "gaussian", or False (lora_B random, for
    tests).

    Raises TypeError or ValueError naming the field. Reference: Hu et al. 2021; rsLoRA:
    Kalajdzievski 2023.
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
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        check_number("lora_alpha", self.lora_alpha)
        check_dropout(self.lora_dropout)
        check_init(self.init_lora_weights)
        if self.bias not in _BIASES:
            raise ValueError(f"bias: expected one of {', '.join(_BIASES)}, got {self.bias!r}")
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("use_rslora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        if self.lora_bias and self.init_lora_weights == "gaussian":
            raise ValueError("init_lora_weights: PEFT reads no 'gaussian' together with lora_bias")
        for key, value in self.rank_pattern.items():
            check_rank(f"rank_pattern[{key!r}]", value)
        for key, value in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{key!r}]", value)
        for key in (*self.rank_pattern, *self.alpha_pattern):
            _regex("rank_pattern or alpha_pattern", key)

    def excludes(self, name: str) -> bool:
        return self.exclude_modules is not None and _matches(self.exclude_modules, name)

    def targets(self, name: str) -> bool:
        """Whether the module of this full name is asked for ("all-linear" is not a name: False)."""
        if self.target_modules is None or self.all_linear:
            return False
        return _matches(self.target_modules, name)

    @property
    def all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def rank_of(self, name: str) -> int:
        return _overridden(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return _overridden(self.alpha_pattern, name, self.lora_alpha)

    def scaling_of(self, name: str) -> float:
        return scaling(self.alpha_of(name), self.rank_of(name), self.use_rslora)

    def to_dict(self) -> dict[str, Any]:
        """The fields of PEFT's ``adapter_config.json``."""
        values = asdict(self)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        return {"peft_type": "LORA", "inference_mode": True, **values}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LoRAConfig:
        """From PEFT's fields; those fastlora does not have pass when null, false or empty."""
        kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
        if kind not in (None, "LORA"):
            raise ValueError(f"peft_type: expected LORA, got {kind!r}")
        own = {f.name for f in fields(LoRAConfig)}
        refused = {k: v for k, v in values.items() if k not in own | _DESCRIPTIVE and not _empty(v)}
        if refused:
            given = ", ".join(f"{key}={value!r}" for key, value in sorted(refused.items()))
            raise ValueError(f"config: fastlora does not support {given}")
        task = values.get("task_type")
        known = {key: values[key] for key in own & set(values)}
        return LoRAConfig(**{**known, "task_type": getattr(task, "value", task)})

    @staticmethod
    def of(config: object) -> LoRAConfig:
        """A LoRAConfig as it is, a ``peft.LoraConfig`` translated; anything else is a TypeError."""
        if isinstance(config, LoRAConfig):
            return config
        # By name, so that peft need not be installed, let alone imported, to say no.
        if any(base.__name__ == "LoraConfig" for base in type(config).__mro__):
            return LoRAConfig.from_dict(config.to_dict())  # pyright: ignore[reportAttributeAccessIssue]
        raise TypeError(
            f"config: expected fastlora.LoRAConfig or peft.LoraConfig, got {type(config).__name__}"
        )


def scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def check_rank(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a positive integer rank, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer rank, got {value}")


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


def check_init(value: object) -> None:
    if not isinstance(value, bool) and value != "gaussian":
        raise ValueError(f'init_lora_weights: expected True, False or "gaussian", got {value!r}')


def _names(field_name: str, value: object) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if field_name == "exclude_modules" or value.lower() != "all-linear":
            _regex(field_name, value)
        return value
    if isinstance(value, Iterable):
        names = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
        if all(isinstance(name, str) for name in names):
            return names
    raise TypeError(
        f"{field_name}: expected a list of names or a regular expression, got {value!r}"
    )


def _empty(value: object) -> bool:
    # 0 equals False, but layers_to_transform=0 names a layer.
    return value is None or value is False or value in ("", [], {}, ())


def _regex(field_name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{field_name}: {pattern!r} is not a regular expression: {error}"
        ) from None


def _matches(names: str | tuple[str, ...], name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == wanted or name.endswith("." + wanted) for wanted in names)


def _overridden(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
