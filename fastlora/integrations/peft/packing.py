"""bitsandbytes' 4-bit weights stay as they were loaded beneath a patched model.

On CPUs with AVX512_BF16 an eval forward of ``bitsandbytes.nn.Linear4bit`` (0.50.2) packs the weight
in place for a kernel that has no backward, and rounds each block's absmax to bfloat16. Training
after it sends nothing through the weight to the layers below, merging decodes packed numbers as
plain ones, and unpacking for ``state_dict`` leaves absmax transposed, or quantized anew.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import nn

from fastlora.config.listing import group_by_reason

# Where a layer looks up whether it may pack, and the note that it was us who said no.
_MAY, _NOTE = "support_avx512bf16_for_cpu", "_fastlora_keeps_unpacked"


def keep_unpacked(model: nn.Module, stacklevel: int = 2) -> None:
    """Keeps every 4-bit linear of ``model`` from packing; unpacks, with a warning, what is packed.

    Those without an adapter too: gradients pass through them on their way to the layers below.
    """
    packed = {}
    for name, layer in _list_linears(model).items():
        if vars(layer).get(_MAY):
            vars(layer).update({_MAY: False, _NOTE: True})
        if _unpack(layer):
            packed[name] = "was packed by bitsandbytes in an eval forward before patch_peft"
    if packed:
        warnings.warn(
            f"peft_model: {'; '.join(group_by_reason(packed))}. It is unpacked now, but packing "
            "has rounded the absmax of its blocks to bfloat16 for good: load the model anew for "
            "the numbers that it was saved with, and patch it before its first forward",
            stacklevel=stacklevel + 1,
        )


def let_pack(model: nn.Module) -> None:
    """Undoes ``keep_unpacked``: the layers pack where bitsandbytes would on this machine."""
    for layer in _list_linears(model).values():
        if vars(layer).pop(_NOTE, False):
            vars(layer)[_MAY] = bool(_import_bitsandbytes().functional.has_avx512bf16())


def _list_linears(model: nn.Module) -> dict[str, Any]:
    """Lists every Linear4bit by name; none where bitsandbytes has not been imported."""
    if "bitsandbytes" not in sys.modules:
        return {}
    kind = getattr(_import_bitsandbytes().nn, "Linear4bit", ())
    return {name: each for name, each in model.named_modules() if isinstance(each, kind)}


def _import_bitsandbytes() -> Any:
    return sys.modules["bitsandbytes"]


def _unpack(layer: Any) -> bool:
    """Gives a weight that is packed, or was for a state_dict, back the form it was loaded in."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    absmax = getattr(state, "absmax", None)
    if state is None or absmax is None:
        return False
    if getattr(state, "packing_format_for_cpu", False):
        # Its inverse would quantize absmax again, where it was quantized: one more rounding.
        state.original_nested, state.offset, state.state2 = False, None, None
        unpacked = _import_bitsandbytes().functional._convert_weight_packed_for_cpu_inverse
        weight.data, _ = unpacked(weight.data, state)
    elif absmax.dim() != 2:
        return False
    # A packed absmax is (K / blocksize, N), and its inverse leaves it so.
    state.absmax = state.absmax.T.reshape(-1).float()
    # A copy of a packed layer has a state of its own beside its weight's.
    layer.quant_state = state
    return True
