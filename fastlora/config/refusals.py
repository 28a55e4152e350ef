"""Refusals: what PEFT's configs can ask for and fastlora does not do, by name, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields that are refused unless they are null, false or empty.
FIELDS = {
    "alora_invocation_tokens": "an adapter that only some tokens of a row go through",
    "arrow_config": "routing between adapters",
    "corda_config": "an initialisation from activations",
    "ensure_weight_tying": "adapters tied to each other",
    "eva_config": "an initialisation from activations",
    "kasa_config": "KaSA's singular values",
    "layer_replication": "layers that are repeated",
    "loftq_config": "a base that is quantised on the way",
    "lora_ga_config": "an initialisation from gradients",
    "megatron_config": "Megatron's parallel linears",
    "monteclora_config": "sampled adapters",
    "target_parameters": "adapters of parameters that are no linear's weight",
    "trainable_token_indices": "trained rows of an embedding; modules_to_save trains all of it",
    "use_bdlora": "block-diagonal factors",
    "use_dora": "DoRA's magnitudes",
    "use_qalora": "pooled inputs of a quantised base",
    "velora_config": "compressed activations",
}
# Values of init_lora_weights, of an adapter that is to begin.
INITS = {
    "corda": "it takes activations of the base to compute",
    "eva": "it takes activations of the base to compute (what PEFT has trained so loads)",
    "loftq": "it quantises the base",
    "lora_ga": "it takes gradients of the base to compute",
    "mica": "it trains lora_A alone (what PEFT has trained so loads)",
}
# The same values in a file. Some began beside the base as it is: history. Others changed it.
_SAME_BASE = ("eva", "mica")
_SUBTRACTED = (
    "PEFT subtracted what the adapter began as from the base's weights. Have PEFT save it with "
    "path_initial_model_for_weight_conversion, which makes it one for the base as it was"
)
_OTHER_BASE = {
    "corda": _SUBTRACTED,
    "loftq": "PEFT put quantised weights in the place of the base's",
    "lora_ga": _SUBTRACTED,
}
_HOW_IT_BEGAN = ("corda_config", "eva_config", "loftq_config", "lora_ga_config")


def drop_history(values: Mapping[str, Any], trainable: bool = False) -> dict[str, Any]:
    """Drops a file's fields that only say how its adapter began, where its base is plain.

    trainable: whether it is to be trained on. Raises ValueError for an adapter of another base.
    """
    init = values.get("init_lora_weights", True)
    for other, reason in _OTHER_BASE.items():
        if str(init).startswith(other):
            raise ValueError(
                f"init_lora_weights={init!r}: the adapter is for another base: {reason}; where the "
                "model given is that base, write true for it in this file"
            )
    if init == "mica" and trainable:
        raise ValueError(
            "is_trainable: an adapter of init_lora_weights='mica' trains lora_A alone, which "
            "fastlora does not: load it without, or train it in PEFT"
        )
    plain = {key: value for key, value in values.items() if key not in _HOW_IT_BEGAN}
    return plain | ({"init_lora_weights": True} if init in _SAME_BASE else {})


def describe_fields(refused: dict[str, object]) -> str:
    """Lists the values and the reasons of fields that are not fastlora's."""
    unknown = "a field that this version does not know"
    return "; ".join(
        f"{key}={value!r} ({FIELDS.get(key, unknown)})" for key, value in sorted(refused.items())
    )
