"""fastlora beneath other libraries; each of them is imported when it is asked for."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fastlora.model.report import Report, describers


def patch_peft(peft_model: nn.Module, *, strict: bool = False) -> Report:
    """Runs a PEFT model's LoRA linears on fastlora's kernels, in place; returns the report.

    peft_model: a ``peft.PeftModel``, or any module into which PEFT has put LoRA layers. Every
    ``peft.tuners.lora.Linear`` keeps its attributes and its parameters and gets another forward
    pass, which reads them at each call: the model keeps PEFT's whole API (adding, choosing,
    deleting and disabling adapters, hot-swapping, merging, ``adapter_names``, saving), and what
    is done with it shows at once. Layers that PEFT adds later are patched as they come, where the
    model has a ``peft.LoraModel``; elsewhere call it again.

    The report names the layers that run on fastlora (``replaced``), those of them whose base is no
    plain linear and computes its own output, onto which the adapters are added (``around``), and
    the layers that were left alone, with the reason (``skipped``): PEFT computes those as before.
    ``fastlora.report(peft_model)`` says the same later on.

    4-bit linears of bitsandbytes are kept from packing their weights, which an eval forward does on
    CPUs with AVX512_BF16; one that is packed already is unpacked, and a UserWarning names it, since
    packing has rounded it.

    strict: raises ValueError, the model unchanged, where a layer was left alone. Raises ValueError
    too where PEFT has put no LoRA layer into the model, or none that can be patched.
    """
    from fastlora.integrations import peft

    return peft.patch(peft_model, strict)


def unpatch_peft(peft_model: nn.Module) -> None:
    """Gives every patched layer PEFT's own forward pass back, and lets 4-bit weights pack again.

    Raises ValueError where nothing is patched.
    """
    from fastlora.integrations import peft

    peft.unpatch(peft_model)


def _describe(model: nn.Module) -> dict[str, Any]:
    # A model without such layers has not imported what knows them, nor PEFT, which takes seconds.
    if "fastlora.integrations.peft.linear" not in sys.modules:
        return {}
    from fastlora.integrations import peft

    return peft.describe(model)


describers.append(_describe)
