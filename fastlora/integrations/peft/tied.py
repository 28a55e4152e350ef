"""Merging in a patched PEFT model: not into weights that other modules read too."""

from __future__ import annotations

from peft.tuners.lora import layer as lora
from torch import nn

from fastlora.model import tied

_REMEDY = (
    "leave the layer out of target_modules, or untie it first: give its base layer's weight a "
    "copy (torch.nn.Parameter(weight.detach().clone())) and set tie_word_embeddings=False in the "
    "model's config"
)


def refuse(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raises RuntimeError where an adapter would go into a weight that another module reads too.

    model: around PEFT's layers. adapter_names: what is to be merged, by default what is active.
    PEFT only warns.
    """
    bases = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        merging = set(layer.active_adapters if adapter_names is None else adapter_names)
        merging -= set(layer.merged_adapters)
        # Embeddings have their factors elsewhere.
        held = merging & (layer.lora_A.keys() | layer.lora_embedding_A.keys())
        base = layer.get_base_layer()
        if held and base._parameters.get("weight") is not None:
            bases[name] = base
    tied.refuse_tied(model, bases, _REMEDY)
