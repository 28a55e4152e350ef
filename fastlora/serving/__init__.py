"""Serving many adapters over one base model."""

from fastlora.serving.bank import AdapterBank
from fastlora.serving.engine import Engine
from fastlora.serving.entry import BankStats, Lease
from fastlora.serving.layout import Factors, Layout
from fastlora.serving.model import MultiLoRAModel
from fastlora.serving.request import Event, Request
from fastlora.serving.stream import Stream

__all__ = [
    "AdapterBank",
    "BankStats",
    "Engine",
    "Event",
    "Factors",
    "Layout",
    "Lease",
    "MultiLoRAModel",
    "Request",
    "Stream",
]
