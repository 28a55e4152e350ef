"""Serving many adapters over one base model."""

from fastlora.serving.bank import AdapterBank
from fastlora.serving.entry import BankStats, Lease
from fastlora.serving.layout import Factors, Layout
from fastlora.serving.model import MultiLoRAModel

__all__ = ["AdapterBank", "BankStats", "Factors", "Layout", "Lease", "MultiLoRAModel"]
