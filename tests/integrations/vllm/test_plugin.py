"""Registering with vLLM, and standing aside: a stand-in has vLLM's names, no part of it is run."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fastlora.integrations.vllm import interface, plugin

ROOT = Path(__file__).resolve().parents[3]
STOCK = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
OURS = "fastlora.integrations.vllm.wrapper.PunicaWrapperFastLoRA"


class Platform:
    @classmethod
    def get_punica_wrapper(cls) -> str:
        return STOCK

    @classmethod
    def check_and_update_config(cls, config) -> None:
        if config.lora_config is not None:
            config.compilation_config.mode = Modes.NONE

    def is_cpu(self) -> bool:
        return True


class Modes:
    NONE = VLLM_COMPILE = DYNAMO_TRACE_ONCE = None


for _name in ("NONE", "VLLM_COMPILE", "DYNAMO_TRACE_ONCE"):
    setattr(Modes, _name, Modes())


@pytest.fixture
def platform(monkeypatch) -> type[Platform]:
    """A fresh platform, of the class that vLLM's module says is the current one."""
    own = type("CpuPlatform", (Platform,), {})
    module = ModuleType("vllm.platforms")
    module.current_platform = own()
    monkeypatch.setitem(sys.modules, "vllm.platforms", module)
    for name in ("FASTLORA_VLLM", "FASTLORA_VLLM_COMPILE"):
        monkeypatch.delenv(name, raising=False)
    return own


@pytest.fixture
def wrapper(monkeypatch) -> SimpleNamespace:
    """What would be imported for vLLM's class: the comparison, and our class's module."""
    found = SimpleNamespace(difference=None, missing=None)
    monkeypatch.setattr(interface, "explain_difference", lambda name: found.difference)
    module = ModuleType(OURS.rpartition(".")[0])
    module.explain_missing = lambda: found.missing
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def test_register_puts_our_wrapper_in_place(platform, wrapper):
    plugin.register()
    plugin.register()  # vLLM loads plug-ins in each process, perhaps more than once
    assert platform.get_punica_wrapper() == OURS
    assert Platform.get_punica_wrapper() == STOCK


def test_variable_switches_it_off(platform, wrapper, monkeypatch):
    monkeypatch.setenv("FASTLORA_VLLM", "0")
    plugin.register()
    assert platform.get_punica_wrapper() == STOCK


@pytest.mark.parametrize("reason", ["difference", "missing"])
def test_it_stands_aside_with_one_line(reason, platform, wrapper, caplog):
    setattr(wrapper, reason, "the reason")
    plugin.register()
    assert platform.get_punica_wrapper() == STOCK
    assert [r.getMessage() for r in caplog.records] == [
        "fastlora stands aside, vLLM's own LoRA runs: the reason"
    ]


def test_it_stands_aside_where_it_cannot_be_loaded(platform, monkeypatch, caplog):
    def fail(name):
        raise ImportError("no such module")

    monkeypatch.setattr(interface, "explain_difference", fail)
    plugin.register()
    assert platform.get_punica_wrapper() == STOCK
    assert "ImportError: no such module" in caplog.text


def test_it_stands_aside_on_another_platform(caplog):
    assert plugin.choose_wrapper("vllm.somewhere.PunicaWrapperXPU").endswith("XPU")
    assert "no kernels in place of vllm.somewhere.PunicaWrapperXPU" in caplog.text


@pytest.mark.parametrize("asked, lora, kept", [(True, True, True), (True, False, False),
                                               (False, True, False)])  # fmt: skip
def test_compiling_is_kept_only_where_asked_for(asked, lora, kept, platform, monkeypatch):
    if asked:
        monkeypatch.setenv("FASTLORA_VLLM_COMPILE", "1")
    plugin.register()
    compilation = SimpleNamespace(mode=Modes.VLLM_COMPILE)
    config = SimpleNamespace(lora_config=lora or None, compilation_config=compilation)
    platform.check_and_update_config(config)
    without = Modes.NONE if lora else Modes.VLLM_COMPILE
    assert compilation.mode is (Modes.DYNAMO_TRACE_ONCE if kept else without)
    # Eager, as the user wants it, stays eager.
    compilation.mode = Modes.NONE
    platform.check_and_update_config(config)
    assert compilation.mode is Modes.NONE


def test_registering_loads_no_kernels():
    """It runs in every process of vLLM's."""
    code = (
        "import sys, types; p = type('P', (), {'get_punica_wrapper': classmethod(lambda c: '')});"
        "m = types.ModuleType('vllm.platforms'); m.current_platform = p();"
        "sys.modules['vllm.platforms'] = m;"
        "from fastlora.integrations.vllm.plugin import register; register();"
        "print([n for n in sys.modules if n.split('.')[0] in ('triton', 'peft', 'transformers')"
        " or n.startswith(('fastlora.kernels', 'fastlora.integrations.vllm.layers'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_entry_point_names_register():
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]' in text
    assert 'fastlora = "fastlora.integrations.vllm.plugin:register"' in text


def make_known() -> tuple[type, type]:
    """Classes that look as vLLM's do."""

    def method(arguments: str):
        kinds = inspect.Parameter
        names = ["self", *arguments.split()]
        parameters = [
            kinds(n, kinds.VAR_KEYWORD if n == "kwargs" else kinds.POSITIONAL_OR_KEYWORD)
            for n in names
        ]

        def function(*args, **kwargs):
            raise AssertionError

        function.__signature__ = inspect.Signature(parameters)
        return function

    known = {name: method(arguments) for name, arguments in interface.METHODS.items()}
    read = dict.fromkeys(interface.READ, property(lambda self: None))
    beyond = {name: method("y x") for name in interface.BEYOND}
    base = type("Base", (), {**known, **read, **beyond})
    return base, type("Own", (base,), {})


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__version__ = "0.99.0"
    monkeypatch.setitem(sys.modules, "vllm", module)
    return make_known()


def test_known_interface_has_no_difference(vllm):
    assert interface.compare(*vllm) is None


def test_interface_differs_with_a_new_method(vllm):
    base, own = vllm
    base.add_lora_convolution = base.add_shrink
    assert "a method add_lora_convolution" in interface.compare(base, own)
    assert "this is 0.99.0" in interface.compare(base, own)


@pytest.mark.parametrize("name", ["add_lora_linear", "token_lora_indices"])
def test_interface_differs_without_what_ours_uses(vllm, name):
    base, own = vllm
    delattr(base, name)
    assert name in interface.compare(base, own)


@pytest.mark.parametrize("which", [0, 1])
def test_interface_differs_with_other_arguments(vllm, which):
    vllm[which].add_lora_linear = lambda self, y, x, weights: None
    assert "its add_lora_linear takes (y x weights)" in interface.compare(*vllm)
