"""Serving many adapters over one base model."""

from fastlora.serving.model import MultiLoRAModel

__all__ = ["MultiLoRAModel"]
