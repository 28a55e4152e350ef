#!/bin/sh
# PEFT 0.21.2 with transformers 5.23.0: an adapter that was trained after resize_token_embeddings loses
# the new rows of the input embedding where lm_head is a target. save_pretrained then saves lm_head
# alone, without a word that anything is left out; loaded into a base of the same size the new
# tokens have other vectors than in training, and the logits are others.
#
# Without lm_head among the targets both embeddings are saved, because the vocabulary has another size
# than the base's. get_peft_model_state_dict (peft/utils/save_and_load.py) asks first whether an
# embedding is targeted; if so it never asks about the size, and saves the targeted layers alone.
#
# Installs the versions into a new folder, runs them there, and says what it saw. Ends with 0 while
# they behave so, with 1 when they no longer do. PYTHON: another interpreter.
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
from safetensors.torch import load_file

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
folder = sys.argv[1]
sizes = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
)
transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(f"{folder}/base")


def resized():
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    # New rows are drawn at random. By default (mean_resizing) hardly so, around the old rows' mean,
    # and what is lost is then what they were set to or trained to afterwards.
    model.resize_token_embeddings(101, mean_resizing=False)
    return model


def tried(*targets):
    """What is saved besides LoRA, and how far the logits of old and new tokens are off afterwards."""
    model = peft.get_peft_model(resized(), peft.LoraConfig(target_modules=list(targets)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval().save_pretrained(f"{folder}/adapter")
    saved = load_file(f"{folder}/adapter/adapter_model.safetensors")
    along = sorted(n.removeprefix("base_model.model.") for n in saved if "lora_" not in n)
    again = peft.PeftModel.from_pretrained(resized(), f"{folder}/adapter").eval()
    off = []
    for ids in torch.arange(0, 97), torch.arange(97, 101):
        with torch.no_grad():
            a, b = (m(input_ids=ids[None]).logits for m in (model, again))
        off.append(((a - b).norm() / a.norm()).item())
    print(f"{' and '.join(targets)}: saved along: {', '.join(along)}")
    print(f"    logits off by {off[0]:.2g} (old tokens) and {off[1]:.2g} (new ones)")
    return along, off


along, off = tried("q_proj")
as_said = along == ["lm_head.weight", "model.embed_tokens.weight"] and max(off) < 1e-4
along, off = tried("q_proj", "lm_head")
as_said &= along == ["lm_head.base_layer.weight"] and off[0] < 1e-4 and off[1] > 0.1
print("as described" if as_said else "changed")
sys.exit(not as_said)
PYTHON
"$folder/venv/bin/python" "$folder/seen.py" "$folder"
