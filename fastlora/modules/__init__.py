"""Layers with LoRA, in the place of torch's."""

from fastlora.modules.linear import FastLoRALinear

__all__ = ["FastLoRALinear"]
