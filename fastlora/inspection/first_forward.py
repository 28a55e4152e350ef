"""First forward of a model, watched for layers whose weight is read while they are never called.

For what the source of a model's classes does not say: see ``bypassed``. A mode sees each function
of torch's that gets a layer's weight; the stack says in which module's forward that is.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastlora.config.listing import list_some
from fastlora.inspection import mode_stack
from fastlora.inspection.bypass import explain_bypass, find_reader
from fastlora.inspection.layers import find_peft_layers, is_linear, is_peft_layer
from fastlora.inspection.sources import LOOKS, METADATA, VIEWS
from fastlora.inspection.wrappers import strip_wrappers, unwrap

_NOTE = "_fastlora_bypassed"
# Functions that compute with their first argument.
_FIRST = frozenset({"to", "type", "type_as"})
_here = threading.local()
# The watched forwards under way, in all threads: hooks must stay until they have ended.
_under_way: set[int] = set()
_lock = threading.Lock()


def watch(model: nn.Module) -> None:
    """Has the first forward of ``model``, or of a part of it that is called alone, watched.

    It warns, by name, of layers with adapters that were never called while their weight was
    computed with; ``noted`` says so afterwards. Nothing is left behind then, except where a layer
    is called here and read there: the first forward in the other mode, training or eval, is watched
    too. Compiled or traced ones are not.
    """
    root = unwrap(model)
    names = dict(_iterate_layers(root))
    readers = [find_reader(root, name) for name in names]
    twice = any(each is not None and each.called for each in readers)
    for module in (root, *root.children()):
        if next(_iterate_layers(module), None) is not None and not _has_adapter(module):
            unwatch(module)
            module.register_forward_pre_hook(_BeginHook(twice))
            module.register_forward_hook(_EndHook(), always_call=True)


def refuse_idle(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raises RuntimeError where merging would put an adapter to work that had no part so far."""
    names = {layer: name for name, layer in model.named_modules()}
    for name, layer in layers.items():
        who = get_reading_module(layer)
        reason = explain_bypass(model, [names[layer]]) if who is None else f"{who} reads its weight"
        if reason is not None:
            raise RuntimeError(
                f"{name}: {reason}, so its adapter has had no part in what the model computes, "
                "which merging would change: exclude the layer"
            )


def unwatch_all(model: nn.Module) -> None:
    """Takes back what ``watch`` has put on a model."""
    for module in (model, *model.children()):
        unwatch(module)


def unwatch(model: nn.Module) -> None:
    """Takes back what ``watch`` has put on one module."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, (_BeginHook, _EndHook)):
                hooks.pop(key, None)
                model._forward_hooks_always_called.pop(key, None)


def get_reading_module(layer: nn.Module) -> str | None:
    """Returns the class whose forward was seen to read the layer's weight without calling it."""
    return vars(layer).get(_NOTE)


class _BeginHook:
    def __init__(self, twice: bool) -> None:
        self.twice = twice
        self.seen: set[bool] = set()

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return
        if module.training not in self.seen:
            _begin(module)


class _EndHook:
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        _end(module)


class _FirstForward(TorchFunctionMode):
    def __init__(self, root: nn.Module, frame: FrameType | None) -> None:
        super().__init__()
        self.root, self.frame, self.depth, self.over = root, frame, 0, False
        self.handled = sys.exc_info()[1]
        self.layers = dict(_iterate_layers(root))
        self.called: set[str] = set()
        self.read: dict[str, nn.Module] = {}
        # By identity, which holds as long as they are kept.
        self.weights: dict[int, tuple[Tensor, list[str]]] = {}
        for name, layer in self.layers.items():
            weight = _get_weight(layer)
            if weight is not None:
                self.weights.setdefault(id(weight), (weight, []))[1].append(name)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling() and not self.over and not self.is_interrupted():
            for place, value in enumerate((*args, *kwargs.values())):
                for one in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(one, Tensor) and id(one) in self.weights:
                        self._see(one, _is_computed_with(func, place))
        return func(*args, **kwargs)

    def is_interrupted(self) -> bool:
        """Whether its forward was left by Ctrl-C, of which hooks do not hear."""
        try:
            if self.frame is not None:
                self.frame.clear()
        except RuntimeError:
            return False  # one that runs cannot be cleared
        self.layers, self.weights = {}, {}
        return True

    def _see(self, weight: Tensor, computed: bool) -> None:
        names = [name for name in self.weights[id(weight)][1] if name not in self.called]
        inside = _list_running(self.root) if names else []
        for name in names:
            layer = self.layers[name]
            if any(module is layer for module in inside):
                self.called.add(name)
            elif computed and inside and not self._is_tied(weight, inside[0], layer):
                self.read.setdefault(name, inside[0])

    def _is_tied(self, weight: Tensor, module: nn.Module, layer: nn.Module) -> bool:
        """Whether a module of the model's uses its own weight, which a layer has as well.

        A linear that was replaced, and that something still calls, is none of the model's.
        """
        uses_weight = any(weight is parameter for parameter in module._parameters.values())
        parts = {id(part) for part in self.root.modules()} - {id(part) for part in layer.modules()}
        return uses_weight and id(module) in parts


def _begin(module: nn.Module) -> None:
    forward: _FirstForward | None = getattr(_here, "forward", None)
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_call_impl":
        frame = frame.f_back
    if forward is not None and forward.is_interrupted():
        _stop_forward(forward)
        forward = None
    if forward is None:
        with _lock:
            if not any(isinstance(hook, _BeginHook) for hook in module._forward_pre_hooks.values()):
                return  # taken away meanwhile, by another thread's end
            _here.forward = forward = _FirstForward(module, frame)
            _under_way.add(id(forward))
        forward.__enter__()
    elif forward.root is module:
        forward.depth += 1


def _end(module: nn.Module) -> None:
    forward: _FirstForward | None = getattr(_here, "forward", None)
    if forward is None or forward.root is not module:
        return
    if forward.depth:
        forward.depth -= 1
        return
    _stop_forward(forward)
    if sys.exc_info()[1] is not forward.handled:
        return  # it raised: the next one is the first
    _drop_hooks(module)
    bypassed = {name: who for name, who in forward.read.items() if name not in forward.called}
    for name, who in bypassed.items():
        vars(forward.layers[name])[_NOTE] = type(who).__qualname__
    if bypassed:
        names = {part: strip_wrappers(name) or "the model" for name, part in module.named_modules()}
        unknown = "something that is not in the model"
        sentences = [
            f"{strip_wrappers(name)} (by {names.get(who, unknown)}, a {type(who).__qualname__})"
            for name, who in bypassed.items()
        ]
        warnings.warn(
            "layers with adapters were never called in this forward, while their weight was read: "
            f"{list_some(sentences)}. What their adapters add is not computed, nor trained: leave "
            "them out (exclude_modules)",
            stacklevel=2,
        )


def _stop_forward(forward: _FirstForward) -> None:
    forward.over, forward.frame = True, None
    _here.forward = None
    _under_way.discard(id(forward))
    mode_stack.remove_mode(forward)


def _drop_hooks(module: nn.Module) -> None:
    """Drops the hooks on what was watched, but for the other mode where that may differ."""
    with _lock:
        for part in (module, *module.children()):
            hooks = [
                hook for hook in part._forward_pre_hooks.values() if isinstance(hook, _BeginHook)
            ]
            for hook in hooks:
                hook.seen = {*hook.seen, module.training} if hook.twice else {True, False}
                if len(hook.seen) > 1 and not _under_way and not _has_compiled_graphs():
                    unwatch(part)


def _has_compiled_graphs() -> bool:
    """Whether anything was compiled: guarded by hooks, it would be again once they are gone."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    return dynamo is not None and getattr(dynamo, "FRAME_COUNTER", 1) > 0


def _list_running(root: nn.Module) -> list[nn.Module]:
    """Lists the modules in whose forwards this thread is, the innermost first."""
    modules: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and not (modules and modules[-1] is root):
        if frame.f_code.co_name in ("forward", "_call_impl"):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                modules.append(module)
        frame = frame.f_back
    return modules


def _is_computed_with(func: Any, place: int) -> bool:
    """Whether a function wants the numbers of the tensor that is its argument number ``place``."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in VIEWS
    if name in _FIRST:
        return place == 0
    return name not in METADATA | LOOKS and name not in ("__set__", "__repr__", "__format__")


def _iterate_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linears with adapters; not those within a layer of PEFT's, which knows how to use them."""
    around = tuple(f"{name}." for name in find_peft_layers(model))
    for name, module in model.named_modules():
        if _has_adapter(module) and not name.startswith(around):
            yield name, module


def _has_adapter(module: nn.Module) -> bool:
    """Whether it is a linear with adapters, of ours or PEFT's."""
    if getattr(module, "holds_lora", False):
        return True
    return is_peft_layer(module) and is_linear(_get_base(module))


def _get_base(layer: nn.Module) -> nn.Module:
    while isinstance(layer._modules.get("base_layer"), nn.Module):
        layer = layer._modules["base_layer"]  # pyright: ignore[reportAssignmentType]
    return layer


def _get_weight(layer: nn.Module) -> Tensor | None:
    return _get_base(layer)._parameters.get("weight")
