"""Merging a model's files takes the memory of a few tensors, measured in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import CONFIG, INDEX, PREFIX

ROOT = Path(__file__).resolve().parents[2]

PEAK = """
import sys, torch
from fastlora.merge_files import merge_folder
torch.set_num_threads(1)

def memory(of):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if of in line) // 1024

base, adapter, out = sys.argv[1:]
merge_folder(base, adapter, out + "0")
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
before = memory("VmRSS")
merge_folder(base, adapter, out)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_merge_memory_stays_below_three_tensors(tmp_path):
    """128 MiB in four files of four tensors of 8: less than three of them, where a file has 32."""
    base, config = tmp_path / "base", {"r": 2, "target_modules": ["l"], "peft_type": "LORA"}
    base.mkdir()
    names = [[f"{shard}.{i}.l" for i in range(4)] for shard in range(4)]
    for shard, layers in enumerate(names):
        weights = {f"{n}.weight": torch.zeros(2048, 2048, dtype=torch.bfloat16) for n in layers}
        save_file(weights, base / f"{shard}.safetensors")
    places = {f"{n}.weight": f"{s}.safetensors" for s, layers in enumerate(names) for n in layers}
    (base / INDEX).write_text(json.dumps({"weight_map": places}))
    (base / CONFIG).write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    parts = {"A": torch.ones(2, 2048), "B": torch.ones(2048, 2)}
    every = {
        f"{PREFIX}{n}.lora_{part}.weight": t.clone()
        for layers in names for n in layers for part, t in parts.items()
    }  # fmt: skip
    save_file(every, adapter / "adapter_model.safetensors")
    # By default glibc learns to keep freed blocks of such sizes, and what it still holds is chance.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    arguments = [sys.executable, "-c", PEAK, base, adapter, tmp_path / "out"]
    done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24
