"""``Metrics``: counts for Prometheus, without names of adapters, keys or anything of a request."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastlora.serving.bank.stats import BankStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_OF_BANK = ("known", "resident", "leases", "device_bytes_used", "host_bytes_used")


class Metrics:
    """Metrics of one server. under_way: answers that run or wait. bank: what the bank counts."""

    def __init__(self, under_way: Callable[[], int], bank: Callable[[], BankStats]) -> None:
        self._registry = registry = CollectorRegistry()
        self.answers = Counter(
            "fastlora_http_responses", "Responses, by status.", ["status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "fastlora_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.written_tokens = Counter(
            "fastlora_written_tokens", "Tokens of answers.", registry=registry
        )
        self.first_token = Histogram(
            "fastlora_first_token_seconds",
            "From a request to its answer's first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "fastlora_answer_seconds",
            "From a request to its answer's end.",
            buckets=_SECONDS,
            registry=registry,
        )
        gauge = Gauge("fastlora_under_way", "Answers that run or wait.", registry=registry)
        gauge.set_function(under_way)
        for name in _OF_BANK:
            of_bank = Gauge(f"fastlora_bank_{name}", f"The bank's {name}.", registry=registry)
            of_bank.set_function(lambda name=name: getattr(bank(), name))

    def render(self) -> bytes:
        """Returns Prometheus' text."""
        return generate_latest(self._registry)
