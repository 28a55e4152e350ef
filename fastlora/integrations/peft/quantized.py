"""PEFT's LoRA layers around bitsandbytes' quantized linears, the adapters on fastlora's kernels.

The base computes its own output; PEFT merges, for it rounds a quantized weight anew.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from torch import Tensor, nn

from fastlora.integrations.peft.linear import forward

# {PEFT's class: ours}
QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {}

if is_bnb_available():
    from peft.tuners.lora import bnb

    class Linear8bitLt(bnb.Linear8bitLt):
        """``peft.tuners.lora.bnb.Linear8bitLt`` by its name and repr."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return forward(self, partial(bnb.Linear8bitLt.forward, self), x, *args, **kwargs)

    QUANTIZED[bnb.Linear8bitLt] = Linear8bitLt

    if is_bnb_4bit_available():

        class Linear4bit(bnb.Linear4bit):
            """``peft.tuners.lora.bnb.Linear4bit`` by its name and repr."""

            def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                return forward(self, partial(bnb.Linear4bit.forward, self), x, *args, **kwargs)

        QUANTIZED[bnb.Linear4bit] = Linear4bit
