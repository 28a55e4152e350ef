"""Adapters of one layer combined into one."""

from fastlora.adapters.combine import combine

__all__ = ["combine"]
