"""Modules trained whole beside an adapter: ``modules_to_save``.

A copy takes the module's place in the model, under its name: its parameters train, its state is
saved under the names that it has there, as PEFT saves it. The original is kept aside, for
``disable_adapter``; it is in no state_dict and no parameters of the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fastlora.config import LoRAConfig


class SavedModule(NamedTuple):
    """A module and the copy that is trained in its place."""

    original: nn.Module
    trained: nn.Module

    def match_copy(self) -> nn.Module:
        """Brings the original to where, and into the mode in which, its copy is by now."""
        self.original.train(self.trained.training)
        pairs = zip(_iterate_tensors(self.original), _iterate_tensors(self.trained), strict=True)
        for tensor, target in pairs:
            if (tensor.device, tensor.dtype) != (target.device, target.dtype):
                tensor.data = tensor.data.to(target.device, target.dtype)
        return self.original


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def find(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Finds {full name: module} of what modules_to_save means, and checks it.

    As in PEFT, an entry means every module whose full name ends in it, and a module with several
    such names gets a copy in each of its places. ValueError where one cannot be copied.
    """
    modules: dict[str, nn.Module] = {}
    places: set[tuple[nn.Module, str]] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, child = name.rpartition(".")
        place = (model.get_submodule(parent), child)
        if name and config.saves(name) and place not in places:
            places.add(place)
            modules[name] = module
    for name, module in modules.items():
        reason = _explain_unfit(name, module, modules)
        if reason is not None:
            raise ValueError(f"modules_to_save: cannot train a copy of {name}: {reason}")
    return modules


def check_disjoint(saved: Mapping[str, nn.Module], linears: Iterable[str]) -> None:
    """Raises ValueError where one of ``linears``, which get LoRA, is in what is trained whole."""
    for linear in linears:
        for name in saved:
            if f"{linear}.".startswith(f"{name}."):
                raise ValueError(
                    f"modules_to_save: cannot train a copy of {name}: target_modules puts LoRA "
                    f"into {linear}; name it in exclude_modules, or what is to be saved in full"
                )


def check_names(config: LoRAConfig, saved: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where a name means nothing, unless PEFT names that head for the task."""
    for ending in config.modules_to_save or ():
        if ending not in config.heads and not any(name.endswith(ending) for name in saved):
            raise ValueError(f"modules_to_save: no module's name ends in {ending!r}")


def copy_modules(modules: Mapping[str, nn.Module]) -> dict[str, SavedModule]:
    """Makes of each a copy to train; the originals are as they were."""
    copies = {name: SavedModule(module, copy.deepcopy(module)) for name, module in modules.items()}
    for module in copies.values():
        module.trained.requires_grad_(True)
    return copies


def list_tensors(saved: Mapping[str, SavedModule], config: LoRAConfig) -> dict[str, Tensor]:
    """Lists {PEFT's name: tensor} of modules trained whole, not copied."""
    tensors: dict[str, Tensor] = {}
    for name, module in saved.items():
        tensors |= list_state(name, module.trained)
        if config.bias == "all":
            # Here PEFT's files have biases once more, by what holds them there.
            held = {"modules_to_save": module.trained, "original_module": module.original}
            for kind, holder in held.items():
                again = list_state(f"{name}.{kind}", holder)
                tensors |= {key: t for key, t in again.items() if key.endswith(".bias")}
    return tensors


def list_state(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Lists {PEFT's name: tensor} of a module's parameters and buffers, not copied."""
    return {f"{name}.{key}": t for key, t in module.state_dict(keep_vars=True).items()}


def _iterate_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _explain_unfit(name: str, module: nn.Module, saved: Mapping[str, nn.Module]) -> str | None:
    if isinstance(module, _CONTAINERS):
        return f"a {type(module).__name__} is not called itself"
    for other, child in module.named_modules():
        full = f"{name}.{other}" if other else name
        if other and full in saved:
            return f"{full} in it is named too"
        if getattr(child, "holds_lora", False):
            return f"{full} has LoRA already"
        if "forward" in child.__dict__:
            return f"the forward of {full} was replaced on the instance (an offloading hook?)"
    if any(not isinstance(t, Tensor) for t in module.state_dict().values()):
        return "its state is not of tensors alone"
    if any(not p.is_floating_point() for p in module.parameters()):
        return "its numbers are no floats (quantised?)"
    return None
