"""Merging adapters into a model's files, for good, a tensor at a time."""

from __future__ import annotations

from fastlora.merge_files.run import Merged, merge_checkpoint, merge_folder

__all__ = ["Merged", "merge_checkpoint", "merge_folder"]
