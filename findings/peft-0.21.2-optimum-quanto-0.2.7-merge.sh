#!/bin/sh
# PEFT 0.21.2 on weights that optimum-quanto 0.2.7 has quantized: merge_adapter and merge_and_unload
# leave the adapter out without an error, with safe_merge or without. The merged model is the base
# model, bit for bit, while PEFT counts its layers as merged. Unmerged the adapter is right.
#
# lora.Linear.merge adds to `base_layer.weight.data`, or assigns it (peft/tuners/lora/layer.py). Of
# quanto's tensor subclass, which wraps others, neither reaches the tensors inside.
#
# Installs the versions into a new folder, runs them there without fastlora, and says what it saw.
# Ends with 0 while they behave so, with 1 when they no longer do. PYTHON: another interpreter.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip torch==2.13.0+cpu 2>/dev/null || pip torch==2.13.0
pip transformers==5.23.0 peft==0.21.2 optimum-quanto==0.2.7

cat > "$folder/seen.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import peft
import torch
from optimum import quanto

warnings.simplefilter("ignore")
SAME = 1e-5


def model():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quanto.quantize(base, weights=quanto.qint8)
    quanto.freeze(base)
    settings = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(base, settings).eval()


def away(got, want):
    return float((got - want).norm() / want.norm())


print(", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "optimum-quanto")))
x, found = torch.randn(3, 64), []
with torch.no_grad():
    for safe in (False, True):
        theirs, alone = model(), model()
        with_adapter = theirs(x)
        with theirs.disable_adapter():
            base = theirs(x)
        theirs.merge_adapter(safe_merge=safe)
        assert theirs.base_model.model[0].merged
        merged, unloaded = theirs(x), alone.merge_and_unload(safe_merge=safe)(x)
        for name, y in (("merge_adapter", merged), ("merge_and_unload", unloaded)):
            print(
                f"  {name}(safe_merge={safe}): {away(y, base):.1e} from the base, "
                f"{away(y, with_adapter):.1e} from the base with its adapter"
            )
            near = {"the base": away(y, base), "the adapter": away(y, with_adapter)}
            found.append(next((what for what, d in near.items() if d < SAME), "neither"))
print(f"  {found}")
sys.exit(0 if found == ["the base"] * 4 else 1)
PYTHON

if "$folder/venv/bin/python" "$folder/seen.py"; then
    echo "As described: merging leaves the adapter out."
else
    echo "The behaviour has changed: expected 'the base' four times." >&2
    exit 1
fi
