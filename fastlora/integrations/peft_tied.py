"""Merging in a patched PEFT model: not into weights that other modules read too."""

from __future__ import annotations

from typing import Any

import peft
from peft.tuners.lora import layer as lora

from fastlora import tied

_REMEDY = (
    "leave the layer out of target_modules, or untie it first: give its base layer's weight a "
    "copy (torch.nn.Parameter(weight.detach().clone())) and set tie_word_embeddings=False in the "
    "model's config"
)


class UntiedMerging(peft.LoraModel):
    """``peft.LoraModel`` that refuses, before it merges anything, what PEFT only warns of.

    RuntimeError where an adapter would go into a weight that another module reads too.
    """

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """PEFT's, of weights that are nobody else's."""
        self._refuse_tied(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_tied(adapter_names)
        return super()._unload_and_optionally_merge(
            merge=merge,
            progressbar=progressbar,
            safe_merge=safe_merge,
            adapter_names=adapter_names,
        )

    def _refuse_tied(self, adapter_names: list[str] | None) -> None:
        bases = {}
        for name, layer in self.model.named_modules():
            if not isinstance(layer, lora.LoraLayer):
                continue
            wanted = set(layer.active_adapters if adapter_names is None else adapter_names)
            wanted -= set(layer.merged_adapters)
            # Those of an embedding have their factors elsewhere.
            held = wanted & (layer.lora_A.keys() | layer.lora_embedding_A.keys())
            base = layer.get_base_layer()
            if held and base._parameters.get("weight") is not None:
                bases[name] = base
        tied.refuse(self.model, bases, _REMEDY)
