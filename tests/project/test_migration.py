"""The table of PEFT's config fields in docs/migration.md is complete and true."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fastlora import LoRAConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
ROWS = re.findall(r"(?m)^\| (`[^|]+`) \| (yes|refused) \|", PAGE.read_text("utf-8"))
TABLE = {field: answer for names, answer in ROWS for field in re.findall(r"`(\w+)`", names)}


def test_migration_table_lists_every_peft_field():
    peft = pytest.importorskip("peft")
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - TABLE.keys() == set()


def test_migration_table_lists_every_fastlora_field():
    assert {f.name for f in dataclasses.fields(LoRAConfig)} <= TABLE.keys()


@pytest.mark.parametrize("field", TABLE)
def test_migration_table_tells_which_fields_are_refused(field):
    refusal = f"config: fastlora does not support {field}=True"
    try:
        LoRAConfig.from_dict({field: True})
        said = "nothing"
    except (TypeError, ValueError) as error:  # also that True is not what the field takes
        said = str(error)
    assert said.startswith(refusal) == (TABLE[field] == "refused"), said


def test_migration_page_sorts_init_methods_correctly():
    (row,) = re.findall(r"(?m)^\| `init_lora_weights` \| yes \| (.*) \|$", PAGE.read_text("utf-8"))
    taken, refused = (re.findall(r'`"([\w[\]]+)"`', part) for part in row.split("; "))
    assert taken
    assert refused
    for how in taken:
        LoRAConfig(init_lora_weights=how.replace("[n]", "4"))
    for how in refused:
        with pytest.raises(ValueError, match="init_lora_weights"):
            LoRAConfig(init_lora_weights=how)
