"""Which tensors of a checkpoint adapters change, and how: all of it checked before anything is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora import functional
from fastlora.listing import by_reason, some
from fastlora.merge_files import model_code, places
from fastlora.merge_files.adapters import AdapterFolder, Layer
from fastlora.merge_files.shards import DTYPES, Checkpoint
from fastlora.receipt import Adapter

# Models whose layers keep their weights as (K, N), whatever PEFT's fan_in_fan_out says: where there
# are linears too, it saves what the last of all layers was.
_FAN_IN_FAN_OUT = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


# What output layers are called.
_OUTPUTS = ("lm_head", "embed_out", "output", "output_layer", "decoder", "head", "proj_out")
_UNTIE = (
    "untie and save the base first (config.tie_word_embeddings=False, and a clone as the output "
    "layer's weight), or merge the loaded model with merge_adapter(model, untie=True)"
)


@dataclass
class WeightChange:
    """Adapters for one weight, stored (N, K), or (K, N) where it is transposed."""

    transposed: bool
    adapters: list[Adapter] = field(default_factory=list)

    def apply(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The merged weight in ``dtype``, rounded once; stored is kept."""
        # One that gets narrower is summed in float32 (float64), as merge_ sums within a half.
        work = stored.to(torch.promote_types(stored.dtype, dtype), copy=True)
        functional.merge_(self.seen(work), self.adapters, receipt=False)
        return work.to(dtype)

    def seen(self, stored: Tensor) -> Tensor:
        """The weight as the adapters see it, (N, K)."""
        return stored.T if self.transposed else stored


@dataclass
class BiasChange:
    """What is added to one bias (N,), or to the trained one that takes its place."""

    trained: Tensor | None = None
    added: list[tuple[Tensor, float]] = field(default_factory=list)

    def apply(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias in ``dtype``, rounded once; stored is kept."""
        total = (stored if self.trained is None else self.trained).to(torch.float64)
        for values, scaling in self.added:
            total = total + values.to(torch.float64) * scaling
        return total.to(dtype)


@dataclass
class Plan:
    """weights, biases: by name of the base's tensor. skipped: what is left out, for people."""

    base: Checkpoint
    dtype: torch.dtype | None
    weights: dict[str, WeightChange] = field(default_factory=dict)
    biases: dict[str, BiasChange] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def change(self, name: str) -> WeightChange | BiasChange | None:
        return self.weights.get(name) or self.biases.get(name)


def make(
    base: Checkpoint,
    adapters: Sequence[AdapterFolder],
    dtype: torch.dtype | None,
    allow_partial: bool,
) -> Plan:
    """Finds the tensors of every adapter's layers; ValueError naming what cannot be merged.

    With allow_partial, layers that the base lacks are left out, and so may be those that the
    adapter's config names and its file lacks; some layer of every adapter must be there.
    """
    method = base.config.get("quantization_config")
    if method is not None:
        kind = method.get("quant_method", method) if isinstance(method, dict) else method
        raise ValueError(
            f"base: {base.folder} is quantised ({kind}), and merged weights would have to be "
            "quantised anew: merge into the model it was made from"
        )
    plan = Plan(base, dtype)
    for adapter in adapters:
        if adapter.biases and (len(adapters) > 1 or adapter.weight != 1):
            # They take the base's place; of two, or of half of one, there is no sum.
            raise ValueError(
                f"{adapter.folder}: it has trained the base's biases (bias="
                f"{adapter.config.bias!r}): expected to merge it alone and with weight 1"
            )
        _add(plan, adapter, allow_partial)
    return plan


def _add(plan: Plan, adapter: AdapterFolder, allow_partial: bool) -> None:
    found = places.find(plan.base, adapter)
    absent = places.absent(adapter, found)
    unfilled = places.unfilled(plan.base, adapter, found)
    if len(absent) == len(adapter.layers) or ((absent or unfilled) and not allow_partial):
        raise ValueError(_incomplete(plan.base, adapter, absent, unfilled))
    plan.skipped += [f"{name} of {adapter.folder}: not in the base" for name in absent]
    plan.skipped += [f"{name} of the base: not in {adapter.folder}" for name in unfilled]
    unfit = model_code.unfit(plan.base, adapter, found.of)
    left = {*absent, *unfit}
    if unfit and (not allow_partial or len(left) == len(adapter.layers)):
        raise ValueError(
            f"{adapter.folder}: cannot be merged into {plan.base.folder}: "
            f"{some(by_reason(unfit), separator='; ')} (allow_partial=True, --allow-partial, "
            "leaves such layers out)"
        )
    plan.skipped += [f"{name} of {adapter.folder}: {reason}" for name, reason in unfit.items()]
    for name, layer in adapter.layers.items():
        if name not in left:
            _add_layer(plan, adapter, name, found.of(name), layer)
    for name, values in adapter.biases.items():
        place = found.of(name)
        # PEFT's files name a bias that is tied with another twice, transformers' once.
        if f"{place}.bias" in plan.base.holder or not _twin(adapter, name, plan.base, found):
            _bias(plan, adapter, place, values).trained = values
    for name, values in adapter.copies.items():
        if name not in absent:
            _check_copy(plan.base, adapter, f"{found.of(name)}.weight", values)


def _add_layer(plan: Plan, adapter: AdapterFolder, name: str, place: str, layer: Layer) -> None:
    weight = f"{place}.weight"
    transposed = _transposed(plan.base, adapter, name, weight, layer)
    _check_untied(plan.base, adapter, name, weight)
    change = plan.weights.setdefault(weight, WeightChange(transposed))
    change.adapters.append((layer.lora_A, layer.lora_B, layer.scaling))
    if layer.lora_bias is not None:
        bias = _bias(plan, adapter, place, layer.lora_bias)
        bias.added.append((layer.lora_bias, layer.scaling))


def _bias(plan: Plan, adapter: AdapterFolder, place: str, values: Tensor) -> BiasChange:
    name = f"{place}.bias"
    if name not in plan.base.holder:
        raise ValueError(
            f"{adapter.folder}: it has a bias for {place}, where {plan.base.folder} has none"
        )
    entry = plan.base.entry(name)
    if entry.shape != tuple(values.shape) or not entry.floating:
        raise ValueError(
            f"{adapter.folder}: the bias of {place}: expected shape {entry.shape}, got "
            f"{tuple(values.shape)}"
        )
    return plan.biases.setdefault(name, BiasChange())


def _twin(adapter: AdapterFolder, name: str, base: Checkpoint, found: places.Places) -> bool:
    """Whether another trained bias, which the base has, is the same."""
    return any(
        torch.equal(values, adapter.biases[name])
        for other, values in adapter.biases.items()
        if f"{found.of(other)}.bias" in base.holder
    )


def _check_copy(base: Checkpoint, adapter: AdapterFolder, weight: str, copy: Tensor) -> None:
    if weight in base.holder and base.entry(weight).floating:
        stored = base.holder[weight].read(weight)
        if torch.equal(stored, copy.to(stored.dtype)):
            return
    raise ValueError(
        f"{adapter.folder}: it has a {weight} of its own, which is not that of {base.folder}: "
        "merge into the model that it was trained on (PEFT leaves base weights out with "
        "save_embedding_layers=False)"
    )


def _incomplete(
    base: Checkpoint, adapter: AdapterFolder, absent: list[str], unfilled: list[str]
) -> str:
    said = []
    if absent:
        said.append(
            f"{len(absent)} of its {len(adapter.layers)} layers are not in {base.folder}: "
            f"{some(absent)}"
        )
    if unfilled:
        said.append(
            f"its config names {len(unfilled)} layers that its file lacks: {some(unfilled)}"
        )
    if any(name.endswith("lm_head") for name in absent) and base.option(
        "tie_word_embeddings", True
    ):
        said.append(
            f"an output layer that is tied to the embedding has no weight of its own: {_UNTIE}"
        )
    if len(absent) < len(adapter.layers):
        said.append("the others are merged with allow_partial=True (--allow-partial)")
    return f"{adapter.folder}: {'; '.join(said)}"


def _transposed(
    base: Checkpoint, adapter: AdapterFolder, name: str, weight: str, layer: Layer
) -> bool:
    """Whether the base stores the weight (K, N); checks its dtype and shape."""
    entry = base.entry(weight)
    if not entry.floating:
        raise ValueError(
            f"base: {weight}: expected a dtype of {', '.join(DTYPES)}, got {entry.dtype}: merge "
            "into the model it was quantised from"
        )
    N, K = layer.lora_B.shape[0], layer.lora_A.shape[1]
    swapped = adapter.config.fan_in_fan_out or base.option("model_type") in _FAN_IN_FAN_OUT
    if N == K and entry.shape == (N, K):
        if adapter.config.fan_in_fan_out and base.option("model_type") not in _FAN_IN_FAN_OUT:
            raise ValueError(
                f"{adapter.folder}: fan_in_fan_out: {name} is square, and only the model's code "
                "says which way its weight lies: merge it there, with merge_and_unload"
            )
        return swapped
    if entry.shape == (N, K):
        return False
    if entry.shape == (K, N) and swapped:
        return True
    hint = " (transposed it would: fan_in_fan_out)" if entry.shape == (K, N) else ""
    raise ValueError(
        f"{adapter.folder}: {name}: the adapter fits a weight of shape {(N, K)}, in {base.folder} "
        f"it has shape {entry.shape}{hint}"
    )


def _check_untied(base: Checkpoint, adapter: AdapterFolder, name: str, weight: str) -> None:
    """Refuses an output layer that transformers exchanges for the embedding when it loads."""
    tied, entry = base.option("tie_word_embeddings"), base.entry(weight)
    if tied is False or entry.shape[0] != base.option("vocab_size"):
        return
    # Where the config leaves it to the model's class, the same numbers twice say it.
    twins = [n for n, shard in base.holder.items() if shard.tensors[n].shape == entry.shape]
    output = name.rpartition(".")[2] in _OUTPUTS
    if (tied and output) or any(twin != weight and base.same(twin, weight) for twin in twins):
        raise ValueError(
            f"{adapter.folder}: {name} is tied to the embedding, which a merge would change too: "
            + _UNTIE
        )
