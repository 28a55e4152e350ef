#!/bin/sh
# PEFT 0.21.2: a batch with adapter_names that ends in an error leaves its names behind. Later batches
# without names, of as many rows, go through those adapters and not through the active one, without a
# word; an active adapter that was set meanwhile changes nothing.
#
# PEFT hands the names to its layers by forward pre-hooks, and takes those back when the forward is
# over. That is the end of a generator with no try around its yield
# (LoraModel._enable_peft_forward_hooks, peft/tuners/lora/model.py): an error, be it an interrupted or
# timed-out request or memory that ran out, passes it by, and the hooks stay until the process ends.
# Batches with names of their own are right: their hooks come after the old ones.
#
# Installs the versions into a new folder, runs them there without fastlora, and says what it saw.
# Ends with 0 while they behave so, with 1 when they no longer do. PYTHON: another interpreter.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip torch==2.13.0+cpu 2>/dev/null || pip torch==2.13.0
pip transformers==5.23.0 peft==0.21.2

cat > "$folder/seen.py" <<'PYTHON'
import sys

import peft
import torch
from torch import nn

torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.interrupted = False

    def forward(self, x):
        y = self.layer(x)
        if self.interrupted:
            raise TimeoutError("this request takes too long")
        return y


settings = peft.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)
model = peft.get_peft_model(Model(), settings, adapter_name="alice")
model.add_adapter("bob", settings)
model.eval()
x = torch.randn(2, 16)


def whose(y):
    """Of each row the adapter that it agrees with."""
    return [next(name for name, want in of.items() if torch.allclose(row, want[i], atol=1e-6))
            for i, row in enumerate(y)]  # fmt: skip


with torch.no_grad():
    of = {}
    for name in ("alice", "bob"):
        model.set_adapter(name)
        of[name] = model(x)
    model.set_adapter("alice")
    before = whose(model(x))
    model.base_model.model.interrupted = True
    try:
        model(x, adapter_names=["bob", "bob"])
    except TimeoutError:
        pass
    model.base_model.model.interrupted = False
    after = whose(model(x))
    named = whose(model(x, adapter_names=["alice", "bob"]))
    again = whose(model(x))
print(f"PEFT {peft.__version__}, torch {torch.__version__}; alice is active")
print(f"  no names, before the error      {before}")
print(f"  no names, after it              {after}  (right: {before})")
print(f"  names alice, bob, after it      {named}")
print(f"  no names, once more             {again}  (right: {before})")
seen = [before, after, named, again]
right = ["alice", "alice"]
sys.exit(0 if seen == [right, ["bob", "bob"], ["alice", "bob"], ["bob", "bob"]] else 1)
PYTHON

if "$folder/venv/bin/python" "$folder/seen.py"; then
    echo "As described: the names of the batch that failed are still there."
else
    echo "The behaviour has changed." >&2
    exit 1
fi
