"""``python -m benchmarks.tables.peak``: the memory that merging takes beside the weight, on a CPU.

Each way runs in a process of its own: the kernel's high-water mark of resident memory during one
merge, less what was resident before it, as a share of the weight. Prints a Markdown table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.peers.peft import make_peft_linear
from fastlora import functional as F

N = K = 8192
R, SCALING = 16, 2.0
# Sizes of the adapter's part beside the weight's.
RATIOS = (0.001, 0.01, 0.1)
WAYS = ("torch", "peft", "fastlora", "fastlora with receipt")


def read_resident(what: str) -> int:
    """Reads bytes of this process: VmRSS now, or VmHWM at most since the mark was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


def measure(way: str, ratio: float) -> dict[str, float]:
    """Measures peak and receipt bytes over the weight's of one merge, after a small one."""
    for rows in (64, N):
        draw = torch.Generator().manual_seed(0)
        weight = (torch.randn(rows, K, generator=draw) * K**-0.5).bfloat16()
        lora_A = (torch.randn(R, K, generator=draw) * K**-0.5).bfloat16()
        lora_B = (torch.randn(rows, R, generator=draw) * ratio / SCALING * R**-0.5).bfloat16()
        layer = make_peft_linear(weight, [(lora_A, lora_B, SCALING)]) if way == "peft" else None
        Path("/proc/self/clear_refs").write_text("5")
        before, receipt_bytes = read_resident("VmRSS"), 0
        if layer is not None:
            layer.merge()
        elif way == "torch":
            weight.addmm_(lora_B, lora_A, alpha=SCALING)
        else:
            receipt = F.merge_(weight, [(lora_A, lora_B, SCALING)], receipt="receipt" in way)
            receipt_bytes = receipt.nbytes if receipt else 0
        peak = read_resident("VmHWM") - before
    return {"peak": peak / weight.nbytes, "kept": receipt_bytes / weight.nbytes}


def main() -> None:
    if sys.argv[1:2] == ["--help"]:
        print(__doc__)
        return
    if sys.argv[1:]:
        torch.set_num_threads(1)
        print(json.dumps(measure(sys.argv[1], float(sys.argv[2]))))
        return
    print(f"| bf16 {N} x {K}, R = {R} | {' | '.join(f'd/W {ratio}' for ratio in RATIOS)} |")
    print("|---" * (1 + len(RATIOS)) + "|")
    for way in WAYS:
        cells = []
        for ratio in RATIOS:
            command = [sys.executable, "-m", "benchmarks.tables.peak", way, str(ratio)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            shares = json.loads(done.stdout)
            receipt = f", receipt {shares['kept']:.1%}" if shares["kept"] else ""
            cells.append(f"{shares['peak']:.1%}{receipt}")
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
