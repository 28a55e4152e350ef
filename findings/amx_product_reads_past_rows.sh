#!/usr/bin/env bash
# torch 2.13.0 (oneDNN 3.12) on a CPU with AMX: a bfloat16 product takes in what lies behind the rows
# of its left operand. Of a column slice that is the rest of the wider tensor, of a dense matrix the
# beginning of the next row; zeros meet it inside, so it shows where it is NaN or infinite.
# K is divided into ceil(K / 32) steps of an even number of columns, and read to the last one's end:
# 33, 34, 35, 37 and 68 columns are read past, 32, 36, 64 and 66 are not. 16 rows or fewer are right,
# float32 is, and so is bfloat16 with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16.
#
# Seen (Intel Xeon with amx_bf16, 40 rows, 64 columns of the result):
#   slice of NaN:     33 34 35 37 68 of 32 33 34 35 36 37 64 66 68
#   next row is NaN:  33 34 35 37 68 of 32 33 34 35 36 37 64 66 68
#   without AMX:      none
set -euo pipefail
grep -qw amx_bf16 /proc/cpuinfo || { echo "not to be seen here: this CPU has no AMX"; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0+cpu 2>/dev/null || "$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q numpy==2.4.6

cat >"$work/probe.py" <<'PY'
import torch

torch.manual_seed(0)
widths, rows = (32, 33, 34, 35, 36, 37, 64, 66, 68), 40


def spoiled(x):
    """Whether rows 0, 2, 4, ... of the product, finite themselves, hold NaN."""
    y = x @ torch.randn(x.shape[1], 64).bfloat16()
    return bool(y[::2].isnan().any())


def in_a_slice(k):
    wide = torch.full((rows, k + 8), torch.nan, dtype=torch.bfloat16)
    wide[:, :k] = torch.randn(rows, k)
    return wide[:, :k]


def before_a_bad_row(k):
    x = torch.randn(rows, k).bfloat16()
    x[1::2] = torch.nan
    return x


for name, make in ("slice", in_a_slice), ("row", before_a_bad_row):
    print(name, *(k for k in widths if spoiled(make(k))))
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
seen=$("$work/venv/bin/python" "$work/probe.py")
capped=$(ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 "$work/venv/bin/python" "$work/probe.py")
printf 'with AMX:\n%s\nwithout:\n%s\n' "$seen" "$capped"
[ "$seen" = $'slice 33 34 35 37 68\nrow 33 34 35 37 68' ] || { echo "changed"; exit 1; }
[ "$capped" = $'slice\nrow' ] || { echo "changed"; exit 1; }
echo "as described"
