"""What PEFT's configs can ask for and fastlora does not do, by name, and why."""

from __future__ import annotations

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
# Values of init_lora_weights.
INITS = {
    "corda": "it takes activations of the base to compute",
    "eva": "it takes activations of the base to compute",
    "loftq": "it quantises the base",
    "lora_ga": "it takes gradients of the base to compute",
    "mica": "it trains lora_A alone",
}


def fields(given: dict[str, object]) -> str:
    """The values and the reasons, of fields that are not fastlora's."""
    unknown = "a field that this version does not know"
    return "; ".join(
        f"{key}={value!r} ({FIELDS.get(key, unknown)})" for key, value in sorted(given.items())
    )
