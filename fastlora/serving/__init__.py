"""Serving many adapters over one base model."""

from fastlora.serving.bank.bank import AdapterBank
from fastlora.serving.bank.layout import Factors, Layout
from fastlora.serving.bank.lease import Lease
from fastlora.serving.bank.stats import BankStats
from fastlora.serving.engine.engine import Engine
from fastlora.serving.engine.request import Event, Request
from fastlora.serving.engine.stream import Stream
from fastlora.serving.model import MultiLoRAModel

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
