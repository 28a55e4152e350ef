"""fastlora: LoRA in drop-in torch modules, trained, served and merged.

``replace_linear`` puts it into a model, ``save_adapter`` and ``load_adapter`` speak PEFT's files,
``MultiLoRAModel`` serves many adapters in one batch, ``fastlora.functional`` holds the ops.
README.md has a tour; ``pip install .`` from a checkout installs it, a bare checkout works as it is.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the Triton kernels lie beside this package, not inside it: find them there too.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from fastlora import functional, moved
from fastlora.adapters.combine_files import combine_adapters
from fastlora.config import LoRAConfig
from fastlora.functional.fidelity import FidelityWarning
from fastlora.integrations import patch_peft, unpatch_peft
from fastlora.merge_files import merge_checkpoint
from fastlora.model.load import load_adapter
from fastlora.model.merging import (
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    swap_adapter,
    unmerge_adapter,
)
from fastlora.model.replace import replace_linear
from fastlora.model.report import Report, report
from fastlora.model.save import adapter_state_dict, save_adapter
from fastlora.model.training import adapter_parameters, use_adapters
from fastlora.modules.conv1d import FastLoRAConv1D
from fastlora.modules.linear import FastLoRALinear
from fastlora.modules.served import MultiLoRALinear
from fastlora.ops.dispatch import backend, use_backend
from fastlora.ops.invariance import batch_invariant
from fastlora.serving import MultiLoRAModel

__all__ = [
    "FastLoRAConv1D",
    "FastLoRALinear",
    "FidelityWarning",
    "LoRAConfig",
    "MultiLoRALinear",
    "MultiLoRAModel",
    "Report",
    "adapter_parameters",
    "adapter_state_dict",
    "backend",
    "batch_invariant",
    "combine_adapters",
    "disable_adapter",
    "functional",
    "load_adapter",
    "merge_adapter",
    "merge_and_unload",
    "merge_checkpoint",
    "patch_peft",
    "replace_linear",
    "report",
    "save_adapter",
    "swap_adapter",
    "unmerge_adapter",
    "unpatch_peft",
    "use_adapters",
    "use_backend",
]

moved.find_old_paths()
