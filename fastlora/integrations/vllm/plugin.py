"""What vLLM's entry point calls in each of its processes: which class is to apply LoRA.

``FASTLORA_VLLM=0`` switches it off, ``FASTLORA_VLLM_COMPILE=1`` lets vLLM compile models with LoRA
on a CPU. Nothing but this file is imported here: most of vLLM's processes never make a wrapper.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

# A child of vLLM's logger, which it has given a handler.
_log = logging.getLogger("vllm.fastlora")
# vLLM's own class -> the module and the class that take its place.
WRAPPERS = {
    "PunicaWrapperCPU": ("fastlora.integrations.vllm.wrapper", "PunicaWrapperFastLoRA"),
    "PunicaWrapperGPU": ("fastlora.integrations.vllm.wrapper_cuda", "PunicaWrapperFastLoRACUDA"),
}


def register() -> None:
    """Makes vLLM's platform ask ``choose_wrapper``; may be called more than once."""
    if os.environ.get("FASTLORA_VLLM") == "0":
        _log.info("fastlora stands aside: FASTLORA_VLLM=0")
        return
    current = importlib.import_module("vllm.platforms").current_platform
    platform: Any = type(current)
    of_vllm = platform.get_punica_wrapper
    if getattr(of_vllm, "__module__", "") == __name__:
        return

    def get_punica_wrapper(cls: type) -> str:
        return choose_wrapper(of_vllm())

    platform.get_punica_wrapper = classmethod(get_punica_wrapper)
    if os.environ.get("FASTLORA_VLLM_COMPILE") == "1" and current.is_cpu():
        _keep_compiling(platform)


def choose_wrapper(of_vllm: str) -> str:
    """The qualified name of our class, or of vLLM's where ours stands aside; one line says why."""
    try:
        name, reason = _load_wrapper(of_vllm)
    except Exception as error:  # whatever it is, vLLM is to go on without us
        name, reason = "", f"{type(error).__name__}: {error}"
    if reason is not None:
        _log.warning("fastlora stands aside, vLLM's own LoRA runs: %s", reason)
        return of_vllm
    return name


def _load_wrapper(of_vllm: str) -> tuple[str, str | None]:
    """The class to take the place of vLLM's, and what speaks against it."""
    found = WRAPPERS.get(of_vllm.rpartition(".")[2])
    if found is None:
        return "", f"fastlora has no kernels in place of {of_vllm}"
    interface = importlib.import_module("fastlora.integrations.vllm.interface")
    reason = interface.explain_difference(of_vllm)
    if reason is None:
        module = importlib.import_module(found[0])
        reason = module.explain_missing()
    return ".".join(found), reason


def _keep_compiling(platform: Any) -> None:
    """Lets a model with LoRA be compiled as vLLM's CPU platform compiles one without.

    The platform switches compiling off with LoRA, as its wrapper's eager code could not be traced.
    """
    of_vllm = platform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        config = vllm_config.compilation_config
        asked = config.mode
        of_vllm(vllm_config)
        modes = type(config.mode)
        if vllm_config.lora_config is not None and asked == modes.VLLM_COMPILE:
            config.mode = modes.DYNAMO_TRACE_ONCE

    platform.check_and_update_config = classmethod(check_and_update_config)
