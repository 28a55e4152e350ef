#!/bin/sh
# PEFT 0.21.2: two ways in which hot-swapping gives an adapter another scaling, without an error or
# a warning.
#
# hotswap_adapter forgets rank_pattern and alpha_pattern. It asks for both configs' alpha_pattern to
# be alike, then matches the patterns against names of tensors ("….q.lora_A.default.weight", in
# peft/utils/hotswap.py) instead of names of modules. A pattern matches the end of a name, so none
# does, and every layer gets the scaling of the config's lora_alpha and r. Loading the same folder
# with PeftModel.from_pretrained is right.
#
# prepare_model_for_compiled_hotswap(model, target_rank=…, config=model.peft_config) pads the
# matrices with zeros and sets r to target_rank in the config, but leaves lora_alpha. The model
# computes what it did; what save_pretrained writes then is scaled by r / target_rank.
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
import warnings

import peft
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

warnings.simplefilter("error")
folder = sys.argv[1]
x = torch.eye(6)


class Base(torch.nn.Module):
    """Two linears of the same weights each time, added."""

    def __init__(self):
        super().__init__()
        self.q, self.v = (torch.nn.Linear(6, 6) for _ in range(2))
        for i, p in enumerate(self.parameters()):
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))

    def forward(self, x):
        return self.q(x) + self.v(x)


def adapted(seed, **options):
    config = peft.LoraConfig(target_modules=["q", "v"], **options)
    model, generator = peft.get_peft_model(Base(), config).eval(), torch.Generator()
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, generator=generator.manual_seed(seed + len(name)))
    return model


def scalings(model):
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return [float(layer.scaling["default"]) for layer in layers]


def off(model, want):
    with torch.no_grad():
        return float((model(x) - want).norm() / (want - Base()(x)).norm())


print(f"PEFT {peft.__version__}, torch {torch.__version__}; differences relative to the adapter's part")
found = []
for pattern in ({"alpha_pattern": {"q": 8}}, {"rank_pattern": {"q": 4}}):
    one, other = (adapted(seed, r=2, lora_alpha=2, **pattern) for seed in (0, 1000))
    at = f"{folder}/{next(iter(pattern))}"
    other.save_pretrained(at)
    wanted = scalings(other)
    with torch.no_grad():
        want = other(x)
    loaded = peft.PeftModel.from_pretrained(Base(), at).eval()
    hotswap_adapter(one, at, adapter_name="default", torch_device="cpu")
    print(f"  {pattern}: scalings {wanted}, loaded {scalings(loaded)}, swapped {scalings(one)}; "
          f"loaded is off by {off(loaded, want):.0e}, swapped by {off(one, want):.2f}")
    found += [off(loaded, want) < 1e-5, off(one, want) > 0.1, scalings(one) == [1.0, 1.0]]

model = adapted(0, r=2, lora_alpha=4)
with torch.no_grad():
    want = model(x)
prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
model.save_pretrained(f"{folder}/padded")
again = peft.PeftModel.from_pretrained(Base(), f"{folder}/padded").eval()
print(f"  padded from r=2 to 4: scalings {scalings(model)}, saved and loaded {scalings(again)}; "
      f"padded is off by {off(model, want):.0e}, loaded by {off(again, want):.2f}")
found += [off(model, want) < 1e-5, 0.49 < off(again, want) < 0.51]
sys.exit(0 if all(found) else 1)
PYTHON

if "$folder/venv/bin/python" "$folder/seen.py" "$folder"; then
    echo "As described: a swap forgets the patterns, and a padded adapter is saved at half its scaling."
else
    echo "The behaviour has changed." >&2
    exit 1
fi
