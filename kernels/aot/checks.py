"""What a compiled kernel must be: in registers, within the chip, on tensor cores, safe of overflow.

``examine`` looks at one of triton's compiled kernels and tells its figures and its faults.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from triton import knobs

from fastlora.kernels.tile import fitting

# Tensor memory that a block may ask for, in columns.
TENSOR_MEMORY = 512
# Bytes of stack that are no spill: with registers to spare, ptxas parks a few values that a loop
# does not use, written and read once, to let one block more onto an SM. The table shows them.
PARKED = 32
# Operands of no alignment take a register an address: some spills are the price of one tile shape
# for all, on calls that are slow for other reasons. 64 addresses of four bytes: what triton 3.6
# needs at most; 3.9 stays below 128 bytes.
PARKED_ODD = 256
TARGETS = {80: "sm_80", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
PRODUCTS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
COPIES = {"tma": "cp.async.bulk.tensor", "cp.async": "cp.async.c"}


@dataclass(frozen=True)
class Row:
    """Figures of one compiled kernel; shared in bytes."""

    kernel: str = ""
    dtype: str = ""
    config: str = ""
    arch: int = 0
    variant: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    products: str = "-"
    copies: str = "-"
    seconds: float = 0.0
    faults: tuple[str, ...] = ()

    def label(self) -> str:
        return f"{self.kernel} {self.dtype} {self.config} sm_{self.arch} {self.variant}"


def examine(
    kernel, arch: int, needs: Iterable[str] = (), odd: bool = False, parked: int | None = None
) -> Row:
    """Figures and faults of a compiled kernel, which needs ``needs`` in its PTX.

    parked: bytes of stack that are no fault of it, whatever its registers.
    """
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    used = usage(cubin)
    stack = used["STACK"] + used["LOCAL"]
    shared, columns = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", None) or 0
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    faults = []
    full = used["REG"] == 255 and not odd
    most = parked if parked is not None else PARKED_ODD if odd else PARKED
    if stack > most or (stack and full and parked is None):
        faults.append(f"spills: {stack} bytes of stack beside {used['REG']} registers")
    limit = fitting.SHARED.get(arch, fitting.LEAST_SHARED)
    if shared > limit:
        faults.append(f"{shared} bytes of shared memory, sm_{arch} has {limit}")
    if columns > TENSOR_MEMORY:
        faults.append(f"{columns} columns of tensor memory, sm_{arch} has {TENSOR_MEMORY}")
    if target is None or target[1] != TARGETS[arch]:
        faults.append(f"compiled for {target and target[1]}, expected {TARGETS[arch]}")
    faults += [f"no {instruction} in its PTX" for instruction in needs if instruction not in ptx]
    faults += narrow_offsets(kernel.asm["ttir"])
    return Row(
        registers=used["REG"], stack=stack, shared=shared,
        products=_found(PRODUCTS, ptx), copies=_found(COPIES, ptx), faults=tuple(faults),
    )  # fmt: skip


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and so on, as cuobjdump reads them from the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}


def narrow_offsets(ttir: str) -> list[str]:
    """Offsets that may pass 2**31 while they are computed in 32 bits.

    A matrix's offset is a coordinate times a stride. So no 32-bit arithmetic may take a stride (an
    argument s_…), widened or not afterwards, and no 32-bit product of tiles may be of two values
    that are not constants. Coordinates, which fit, pass; so does a stride as a plain step of a
    pointer, and what is meant modulo 2**32 (a value modulo_…).
    """
    faults = []
    for line in ttir.splitlines():
        code = line.split(" loc(")[0].strip()
        match = re.match(r"%\S+ = arith\.(\w+) (.+) : (\S+)$", code)
        if match is None or not re.search(r"(^|x)i32>?$", match[3]):
            continue
        operation, operands, kind = match.groups()
        names = re.findall(r"%([\w#]+)", operands)
        stride = next((name for name in names if name.startswith("s_")), None)
        constant = any(re.match(r"c(st)?(_|-?\d|$)", name) for name in names)
        meant = any(name.startswith("modulo_") for name in names)
        product = operation == "muli" and "x" in kind and not constant and not meant
        if (stride and operation != "extsi") or product:
            faults.append(f"a 32-bit offset: {code}")
    return faults


def table(rows: Iterable[Row]) -> list[str]:
    """A line a kernel, dtype, config and target: the worst of its variants."""
    head = ("kernel", "dtype", "config", "arch", "variants", "registers", "stack", "shared KiB")
    lines = [(*head, "products", "copies", "seconds")]
    ordered = sorted(rows, key=lambda row: (row.kernel, row.arch, row.dtype, row.config))
    for key, group in groupby(ordered, lambda row: (row.kernel, row.dtype, row.config, row.arch)):
        same = list(group)
        worst = [max(getattr(row, name) for row in same) for name in ("registers", "stack")]
        seen = [
            "|".join(dict.fromkeys(getattr(row, name) for row in same))
            for name in ("products", "copies")
        ]
        shared = max(row.shared for row in same) / 1024
        seconds = sum(row.seconds for row in same)
        lines.append(
            (*key[:3], f"sm_{key[3]}", len(same), *worst, f"{shared:.1f}", *seen, f"{seconds:.1f}")
        )
    texts = [[str(value) for value in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in texts]


def _found(instructions: dict[str, str], ptx: str) -> str:
    return "+".join(name for name, text in instructions.items() if text in ptx) or "-"
