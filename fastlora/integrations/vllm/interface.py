"""What vLLM's wrapper of LoRA kernels looks like in the versions that ours was written for.

A method that is new, gone, or takes other arguments may mean another layout of tensors, or work
that nobody would do: then ours stands aside as a whole.
"""

from __future__ import annotations

import importlib
import inspect

# Tested with these; another one with the same interface is taken, and said.
VERSIONS = ("0.32.0",)

# Methods that ours replaces, and their arguments.
METHODS = {
    "update_metadata": "mapping lora_index_to_id max_loras vocab_size kwargs",
    "add_shrink": "y x lora_a_stacked scale kwargs",
    "add_expand": "y x lora_b_stacked output_slices offset_start add_inputs kwargs",
    "add_lora_embedding": "y x lora_b_stacked add_inputs kwargs",
    "add_lora_linear": "y x lora_a_stacked lora_b_stacked scale output_slices buffer kwargs",
    "add_lora_logits": "y x lora_a_stacked lora_b_stacked scale buffer kwargs",
}
# Others that there may be, left to vLLM: of whole weights, and of experts.
BEYOND = {"apply_lora_full_linear", "moe_lora_align_block_size", "add_lora_fused_moe"}
BEYOND |= {"add_lora_w13", "add_lora_w2"}
# Attributes that ours reads.
READ = {"token_lora_indices", "sampler_indices", "_update_base_metadata"}


def explain_difference(of_vllm: str) -> str | None:
    """Why ours cannot stand in for vLLM's wrapper of that name; None where it can."""
    module, _, name = of_vllm.rpartition(".")
    base = importlib.import_module("vllm.lora.punica_wrapper.punica_base").PunicaWrapperBase
    return compare(base, getattr(importlib.import_module(module), name))


def compare(base: type, own: type) -> str | None:
    """The first difference of vLLM's base class and wrapper from what is known here, or None."""
    version = getattr(importlib.import_module("vllm"), "__version__", "?")
    known = f"known of vLLM {', '.join(VERSIONS)}, this is {version}"
    public = {n for n, _ in inspect.getmembers(base, inspect.isfunction) if n[0] != "_"}
    for name in sorted(public - METHODS.keys() - BEYOND):
        return f"its wrapper has a method {name}, which is not {known}"
    for name in sorted(METHODS.keys() - public):
        return f"its wrapper has no method {name}, {known}"
    for name in sorted(name for name in READ if not hasattr(base, name)):
        return f"its wrapper has no {name}, {known}"
    for name, arguments in METHODS.items():
        for each in (base, own):
            found = " ".join(list(inspect.signature(getattr(each, name)).parameters)[1:])
            if found not in (arguments, arguments.removesuffix(" kwargs")):
                return f"its {name} takes ({found}), not ({arguments}) as {known}"
    return None
