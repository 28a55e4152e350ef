#!/bin/sh
# PEFT 0.21.2 beside transformers 5.23.0 or 5.24.0: of an adapter for Qwen2.5-VL that was saved with
# transformers 4.51.3 and PEFT 0.15.2, nothing is loaded. PeftModel.from_pretrained warns of missing
# keys and returns a model whose lora_B are zeros: the base model.
#
# transformers 4.52 has put the towers below `model`, so that layers have other names. PEFT renames
# an adapter's tensors by transformers' table (convert_peft_adapter_state_dict_for_transformers),
# but only asks it for the model's type. Qwen2.5-VL's entry is under the name of its class, where
# transformers looks first. The base's files, which have the old names too, load.
#
# Installs the versions into a new folder, runs them there without fastlora, and says what it saw.
# Ends with 0 while they behave so, with 1 when they no longer do. PYTHON: another interpreter.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip torch==2.13.0+cpu 2>/dev/null || pip torch==2.13.0
pip transformers==5.24.0 peft==0.21.2 requests
# Older ones, beside the same packages.
pip --no-deps --target "$folder/before" transformers==5.23.0
pip --no-deps --target "$folder/old" transformers==4.51.3 peft==0.15.2 tokenizers==0.21.1 \
    huggingface_hub==0.30.2

cat > "$folder/write.py" <<'PYTHON'
import sys

import peft
import torch
import transformers

transformers.logging.set_verbosity_error()
SIZES = {"hidden_size": 16, "intermediate_size": 16}
config = transformers.Qwen2_5_VLConfig(
    **SIZES, vocab_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    rope_scaling={"type": "default", "mrope_section": [2, 3, 3]}, bos_token_id=1, eos_token_id=2,
    vision_config={
        **SIZES, "depth": 1, "num_heads": 1, "patch_size": 4, "out_hidden_size": 16,
        "fullatt_block_indexes": [0], "window_size": 16,
    },
)  # fmt: skip
torch.manual_seed(0)
base = transformers.Qwen2_5_VLForConditionalGeneration(config)
base.save_pretrained(sys.argv[1] + "/base")
model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "qkv"]))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter)
model.save_pretrained(sys.argv[1] + "/adapter")
print(f"Saved with transformers {transformers.__version__}, PEFT {peft.__version__}:")
print("  " + "\n  ".join(sorted(peft.get_peft_model_state_dict(model))))
PYTHON

cat > "$folder/read.py" <<'PYTHON'
import sys
import warnings

import peft
import transformers

transformers.logging.set_verbosity_error()
base = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(sys.argv[1] + "/base")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = peft.PeftModel.from_pretrained(base, sys.argv[1] + "/adapter")
print(f"Loaded with transformers {transformers.__version__}, PEFT {peft.__version__}:")
loaded = []
for name, tensor in sorted(peft.get_peft_model_state_dict(model).items()):
    if "lora_B" in name:
        loaded.append(bool(tensor.any()))
        print(f"  {name}  {'loaded' if loaded[-1] else 'zeros'}")
for warning in said:
    if "missing adapter keys" in str(warning.message):
        print(f"  warned: {str(warning.message)[:60]}…")
sys.exit(0 if loaded == [False, False] else 1)
PYTHON

python() { "$folder/venv/bin/python" "$@" 2>/dev/null; }
PYTHONPATH="$folder/old" python "$folder/write.py" "$folder"
if python "$folder/read.py" "$folder" &&
    PYTHONPATH="$folder/before" python "$folder/read.py" "$folder"; then
    echo "As described: nothing of the adapter is loaded, with a warning and no error."
else
    echo "The behaviour has changed: expected zeros in both layers, with both versions." >&2
    exit 1
fi
