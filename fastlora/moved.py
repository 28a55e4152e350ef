"""Classes where 0.1.0 had them, so that models pickled by it (``torch.save(model)``) still load.

What is loaded has the classes of today, and is pickled again under their paths of today.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# 0.1.0's modules that are no more, the classes in pickles, and where each is now.
MOVED = {
    "fastlora.conv1d": {"FastLoRAConv1D": "fastlora.modules.conv1d"},
    "fastlora.grouping": {"RowGroups": "fastlora.functional.row_groups"},
    "fastlora.injection": {
        "Injection": "fastlora.model.record",
        "Report": "fastlora.model.report",
    },
    "fastlora.integrations.peft_linear": {"Linear": "fastlora.integrations.peft.linear"},
    "fastlora.integrations.peft_merging": {"Merged": "fastlora.integrations.peft.merging"},
    "fastlora.integrations.peft_rows": {"Rows": "fastlora.integrations.peft.rows"},
    "fastlora.multi_modules": {
        "MultiLoRALinear": "fastlora.modules.served",
        "TrainableMultiLoRALinear": "fastlora.modules.trained",
        "TrainingRows": "fastlora.modules.training_rows",
    },
    "fastlora.receipt": {"MergeReceipt": "fastlora.functional.receipt"},
    "fastlora.rows.entry": {"Watch": "fastlora.rows.watch"},
    "fastlora.rows.opened": {
        "Opening": "fastlora.rows.hooks:EnterHook",
        "Closing": "fastlora.rows.hooks:LeaveHook",
    },
    "fastlora.saved_modules": {"Saved": "fastlora.modules.saved_modules:SavedModule"},
    "fastlora.trial": {
        "_Before": "fastlora.inspection.first_forward:_BeginHook",
        "_After": "fastlora.inspection.first_forward:_EndHook",
    },
}


class OldPaths:
    """A finder of modules, asked last: those of ``MOVED``, with the classes of today."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, OldPaths) if name in MOVED else None  # pyright: ignore[reportArgumentType]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        for name, place in MOVED[module.__name__].items():
            path, _, new_name = place.partition(":")
            setattr(module, name, getattr(importlib.import_module(path), new_name or name))


def find_old_paths() -> None:
    """Has ``import`` find 0.1.0's modules where nothing else does."""
    if OldPaths not in sys.meta_path:
        sys.meta_path.append(OldPaths)
