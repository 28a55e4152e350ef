"""Plan of a merge: which tensors change and how, all checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlora import functional
from fastlora.backends.dtypes import CODES
from fastlora.config.listing import group_by_reason, list_some
from fastlora.functional.receipt import Adapter
from fastlora.merge_files import layer_lookup, model_code, vocabulary
from fastlora.merge_files.adapters import AdapterFolder, Layer
from fastlora.merge_files.shards import Checkpoint, Entry, Shard
from fastlora.merge_files.vocabulary import Vocabulary

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
        """Returns the merged weight in ``dtype``, rounded once; stored is kept."""
        # One that gets narrower is summed in float32 (float64), as merge_ sums within a half.
        work = stored.to(torch.promote_types(stored.dtype, dtype), copy=True)
        functional.merge_(self.orient(work), self.adapters, receipt=False)
        return work.to(dtype)

    def orient(self, stored: Tensor) -> Tensor:
        """Returns the weight as (N, K), transposed where it is stored (K, N)."""
        return stored.T if self.transposed else stored


@dataclass
class BiasChange:
    """Additions to one bias (N,), or to the trained one that takes its place."""

    trained: Tensor | None = None
    added: list[tuple[Tensor, float]] = field(default_factory=list)

    def apply(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the bias in ``dtype``, rounded once; stored is kept."""
        total = (stored if self.trained is None else self.trained).to(torch.float64)
        for values, scaling in self.added:
            total = total + values.to(torch.float64) * scaling
        return total.to(dtype)


@dataclass
class Plan:
    """Changes by name of the base's tensor. skipped: what is left out, as text.

    vocabulary: the adapters' own tensors that take the base's place before anything is added.
    """

    base: Checkpoint
    dtype: torch.dtype | None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    weights: dict[str, WeightChange] = field(default_factory=dict)
    biases: dict[str, BiasChange] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def change(self, name: str) -> WeightChange | BiasChange | None:
        return self.weights.get(name) or self.biases.get(name)

    def is_unchanged(self, entry: Entry) -> bool:
        """Whether a tensor is written as the base has it, but for its dtype."""
        return self.change(entry.name) is None and entry.name not in self.vocabulary.tensors

    def entry(self, name: str) -> Entry:
        """Returns the entry of a tensor as it will be, in the base's dtype."""
        return self.vocabulary.entry(self.base.entry(name))

    def read(self, shard: Shard, name: str) -> Tensor:
        """Reads the tensor to add to: the base's, or the adapter's in its place."""
        stored = self.vocabulary.tensors.get(name)
        return shard.read(name) if stored is None else stored.read()


def make(
    base: Checkpoint,
    adapters: Sequence[AdapterFolder],
    dtype: torch.dtype | None,
    allow_partial: bool,
) -> Plan:
    """Makes the plan of every adapter's layers; ValueError names what cannot be merged.

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
    placed = [(adapter, layer_lookup.find(base, adapter)) for adapter in adapters]
    plan = Plan(base, dtype, vocabulary.find(base, placed, allow_partial))
    plan.skipped += plan.vocabulary.skipped
    for adapter, its_places in placed:
        if adapter.biases and (len(adapters) > 1 or adapter.weight != 1):
            # They take the base's place; of two, or of half of one, there is no sum.
            raise ValueError(
                f"{adapter.folder}: it has trained the base's biases (bias="
                f"{adapter.config.bias!r}): expected to merge it alone and with weight 1"
            )
        _add(plan, adapter, its_places, allow_partial)
    plan.vocabulary.check_whole(base)
    return plan


def _add(
    plan: Plan, adapter: AdapterFolder, places: layer_lookup.Places, allow_partial: bool
) -> None:
    absent = layer_lookup.list_absent(adapter, places)
    unfilled = layer_lookup.list_unfilled(plan.base, adapter, places)
    refused = len(absent) == len(adapter.layers) or (bool(absent) and places.uninstalled)
    if refused or ((absent or unfilled) and not allow_partial):
        raise ValueError(_explain_incomplete(plan.base, adapter, places, absent, unfilled))
    plan.skipped += [f"{name} of {adapter.folder}: not in the base" for name in absent]
    plan.skipped += [f"{name} of the base: not in {adapter.folder}" for name in unfilled]
    unfit = model_code.explain_unfit(plan.base, adapter, places)
    left_out = {*absent, *unfit}
    if unfit and (not allow_partial or len(left_out) == len(adapter.layers)):
        raise ValueError(
            f"{adapter.folder}: cannot be merged into {plan.base.folder}: "
            f"{list_some(group_by_reason(unfit), separator='; ')} (allow_partial=True, "
            "--allow-partial, leaves such layers out)"
        )
    plan.skipped += [f"{name} of {adapter.folder}: {reason}" for name, reason in unfit.items()]
    for name, layer in adapter.layers.items():
        if name not in left_out:
            _add_layer(plan, adapter, name, places.of(name), layer)
    for name, values in adapter.biases.items():
        place = places.of(name)
        # PEFT's files name a bias that is tied with another twice, transformers' once.
        if f"{place}.bias" in plan.base.holder or not _has_twin(adapter, name, plan.base, places):
            _get_bias_change(plan, adapter, place, values).trained = values


def _add_layer(plan: Plan, adapter: AdapterFolder, name: str, place: str, layer: Layer) -> None:
    weight = f"{place}.weight"
    transposed = _is_transposed(plan, adapter, name, weight, layer)
    _check_untied(plan, adapter, name, weight)
    change = plan.weights.setdefault(weight, WeightChange(transposed))
    change.adapters.append((layer.lora_A, layer.lora_B, layer.scaling))
    if layer.lora_bias is not None:
        bias = _get_bias_change(plan, adapter, place, layer.lora_bias)
        bias.added.append((layer.lora_bias, layer.scaling))


def _get_bias_change(plan: Plan, adapter: AdapterFolder, place: str, values: Tensor) -> BiasChange:
    name = f"{place}.bias"
    if name not in plan.base.holder:
        raise ValueError(
            f"{adapter.folder}: it has a bias for {place}, where {plan.base.folder} has none"
        )
    entry = plan.entry(name)
    if entry.shape != tuple(values.shape) or not entry.floating:
        raise ValueError(
            f"{adapter.folder}: the bias of {place}: expected shape {entry.shape}, got "
            f"{tuple(values.shape)}"
        )
    return plan.biases.setdefault(name, BiasChange())


def _has_twin(
    adapter: AdapterFolder, name: str, base: Checkpoint, places: layer_lookup.Places
) -> bool:
    """Whether another trained bias, which the base has, is the same."""
    return any(
        torch.equal(values, adapter.biases[name])
        for other, values in adapter.biases.items()
        if f"{places.of(other)}.bias" in base.holder
    )


def _explain_incomplete(
    base: Checkpoint,
    adapter: AdapterFolder,
    places: layer_lookup.Places,
    absent: list[str],
    unfilled: list[str],
) -> str:
    reasons = []
    if absent:
        reasons.append(
            f"{len(absent)} of its {len(adapter.layers)} layers are not in {base.folder}: "
            f"{list_some(layer_lookup.group_by_kind(absent))}"
        )
    if absent and places.unknown:
        reasons.append(places.unknown)
    if unfilled and not places.unknown:  # or they are the same layers by other names
        reasons.append(
            f"its config names {len(unfilled)} layers that its file lacks: "
            f"{list_some(layer_lookup.group_by_kind(unfilled))}"
        )
    if any(name.endswith("lm_head") for name in absent) and base.option(
        "tie_word_embeddings", True
    ):
        reasons.append(
            f"an output layer that is tied to the embedding has no weight of its own: {_UNTIE}"
        )
    if len(absent) < len(adapter.layers) and not (absent and places.uninstalled):
        reasons.append("the others are merged with allow_partial=True (--allow-partial)")
    return f"{adapter.folder}: {'; '.join(reasons)}"


def _is_transposed(
    plan: Plan, adapter: AdapterFolder, name: str, weight: str, layer: Layer
) -> bool:
    """Whether the base stores the weight (K, N); checks its dtype and shape."""
    base, entry = plan.base, plan.entry(weight)
    if not entry.floating:
        raise ValueError(
            f"base: {weight}: expected a dtype of {', '.join(CODES)}, got {entry.dtype}: merge "
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


def _check_untied(plan: Plan, adapter: AdapterFolder, name: str, weight: str) -> None:
    """Refuses an output layer that transformers exchanges for the embedding when it loads.

    Where the files have both, transformers 5 ties only what is the same, whatever the config says.
    """
    base = plan.base
    tied, entry = base.option("tie_word_embeddings"), base.entry(weight)
    if tied is False or entry.shape[0] != base.option("vocab_size"):
        return
    twins = [
        twin
        for twin, shard in base.holder.items()
        if twin != weight and shard.tensors[twin].shape == entry.shape
    ]
    ties = bool(tied) and name.rpartition(".")[2] in _OUTPUTS
    # Where the config leaves it to the model's class, the same numbers twice say it.
    if (ties and not twins) or any(base.has_same_bytes(twin, weight) for twin in twins):
        raise ValueError(
            f"{adapter.folder}: {name} is tied to the embedding, which a merge would change too: "
            + _UNTIE
        )
    plan.vocabulary.untied |= ties
