"""Suite ``overhead``: the host's time for a call, Python and dispatch, where arithmetic is none.

Layers so small that what remains is what every layer of a model pays for every call, whatever its
size: on a GPU it passes beside the device's work, or the device waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.harness.case import Builder, Call, Case, Operands, Outputs, Work
from benchmarks.peers.compiling import compile_module
from benchmarks.peers.peft import make_peft_linear
from benchmarks.suites.linear import SCALING, Linear
from benchmarks.suites.multi import Multi, make_peft_mixed
from fastlora import FastLoRALinear, MultiLoRALinear
from fastlora import functional as F


class _HostTime(Work):
    """Common part of both kinds of calls: modules as a model calls them, some of them compiled."""

    suite, host_only = "overhead", True
    # A single one is shorter than a clock's reading is steady.
    calls = 50

    def truth(self, case: Case, provider: str) -> str:
        return super().truth(case, _strip_compiled(provider))

    def expected(self, case: Case, operands: Operands, provider: str) -> Outputs:
        return super().expected(case, operands, _strip_compiled(provider))

    def cost(self, case: Case, provider: str) -> tuple[int, int]:
        return super().cost(case, _strip_compiled(provider))


class Overhead(_HostTime, Linear):
    """Call of one layer with one adapter; with ``backward`` its gradients too.

    Without ``backward`` nothing requires a gradient.
    """

    def __init__(self, *, backward: bool) -> None:
        super().__init__(backward=backward)
        self.name = "overhead-train" if backward else "overhead-forward"
        self.gpu_providers: Mapping[str, Builder] = {}
        modules = {"base": _make_linear, "peft": _make_peft, "fastlora": _make_fastlora}
        eager = {name: partial(self._module, make) for name, make in modules.items()}
        self.providers = {
            "base": eager["base"],
            "torch": self.providers["torch"],
            "peft": eager["peft"],
            "fastlora": eager["fastlora"],
            "fastlora-functional": self.providers["fastlora"],
        }
        self.compiled_providers = {
            f"{name}-compiled": partial(self._module, make, compiles=True)
            for name, make in modules.items()
        }

    def _module(self, make: Any, case: Case, o: Operands, *, compiles: bool = False) -> Call:
        layer, factors = make(o)
        run = compile_module(layer, case.device) if compiles else layer
        return self._call(o, lambda: run(o["x"]), [o["x"], *factors])


class OverheadMulti(_HostTime, Multi):
    """Decode step's call of one layer, the rows' ids grouped beforehand."""

    def __init__(self) -> None:
        super().__init__("decode")
        self.name = "overhead-multi"
        self.gpu_providers: Mapping[str, Builder] = {}
        self.providers = {
            "base": _prepare_base,
            "torch": self.providers["torch"],
            "peft": self.providers["peft"],
            "fastlora": _prepare_fastlora,
            "fastlora-functional": self.providers["fastlora"],
        }
        self.compiled_providers = {
            "base-compiled": partial(_prepare_base, compiles=True),
            "peft-compiled": _prepare_peft_compiled,
            "fastlora-compiled": partial(_prepare_fastlora, compiles=True),
        }


def _strip_compiled(provider: str) -> str:
    return provider.removesuffix("-compiled")


def _make_linear(o: Operands) -> tuple[nn.Module, list[Tensor]]:
    linear = nn.Linear(o["weight"].shape[1], o["weight"].shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(o["weight"], requires_grad=False)
    return linear, []


def _make_peft(o: Operands) -> tuple[nn.Module, list[Tensor]]:
    layer = make_peft_linear(o["weight"], [(o["lora_A"], o["lora_B"], SCALING)])
    return layer, [layer.lora_A["0"].weight, layer.lora_B["0"].weight]


def _make_fastlora(o: Operands) -> tuple[nn.Module, list[Tensor]]:
    R, (linear, _) = o["lora_A"].shape[0], _make_linear(o)
    layer = FastLoRALinear.from_linear(linear, R, lora_alpha=SCALING * R)
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, nn.Parameter(o[name].detach(), o[name].requires_grad))
    return layer, [layer.lora_A, layer.lora_B]


def _prepare_base(case: Case, o: Operands, *, compiles: bool = False) -> Call:
    layer, _ = _make_linear(o)
    run = compile_module(layer, case.device) if compiles else layer
    return lambda: {"y": run(o["x"])}


def _prepare_peft_compiled(case: Case, o: Operands) -> Call:
    layer, names = make_peft_mixed(o)
    run = compile_module(layer, case.device)
    return lambda: {"y": run(o["x"], adapter_names=names)}


def _prepare_fastlora(case: Case, o: Operands, *, compiles: bool = False) -> Call:
    S, (linear, _) = case.shape["S"], _make_linear(o)
    layer = MultiLoRALinear.from_linear(linear, S, case.shape["R"], o["lora_A"].dtype)
    for slot, factor in enumerate(o["scalings"].tolist()):
        layer.set_adapter(slot, o["lora_A"][slot], o["lora_B"][slot], factor)
    groups = F.group_rows(o["ids"], S)
    run = compile_module(layer, case.device) if compiles else layer
    return lambda: {"y": run(o["x"], groups)}
