#!/bin/sh
# transformers 5.23.0's Rwkv and PEFT 0.21.2: a LoRA adapter on attention.output or
# feed_forward.value is another one in eval mode than in training, without a word.
#
# In eval mode RwkvModel._rescale_layers divides these layers' weights in place, by 2 for every
# rescale_every blocks (6 by default), and the hidden states with them, so that half precision does
# not overflow. The adapter's factors stay as they are: in block n its part is 2^(n // rescale_every)
# times what was trained. Merged before, the adapter is divided too, and both modes agree.
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
import transformers

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
SAME, OTHER = 1e-3, 1e-1


def between_modes(model):
    """Relative difference of eval mode's logits from training mode's; there is no dropout."""
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        trained = model.train()(input_ids=ids).logits
        return float((model.eval()(input_ids=ids).logits - trained).norm() / trained.norm())


torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 8, "context_length": 16}
base = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes))
found = {"base": between_modes(base)}
base.train()(input_ids=torch.tensor([[1]]))  # the weights are whole again
settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["output", "value"])
model = peft.get_peft_model(base, settings)
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter)
found["adapter"] = between_modes(model)
model.train()(input_ids=torch.tensor([[1]]))
found["merged"] = between_modes(model.merge_and_unload())
print(f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__}")
for name, value in found.items():
    print(f"  {name:<8}  eval's logits from training's  {value:.1e}")
same = max(found["base"], found["merged"]) < SAME
sys.exit(0 if same and found["adapter"] > OTHER else 1)
PYTHON

if "$folder/venv/bin/python" "$folder/seen.py"; then
    echo "As described: with an adapter that is not merged, eval mode is another model."
else
    echo "The behaviour has changed." >&2
    exit 1
fi
