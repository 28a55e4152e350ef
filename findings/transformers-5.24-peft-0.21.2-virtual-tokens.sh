#!/bin/sh
# transformers 5.24.0 and PEFT 0.21.2, its newest: generate ignores PEFT's prefix tuning, and puts a
# tuned prompt in again before every later token, without an error. PEFT's forward is right; so is
# generate of transformers 5.23.0.
#
# transformers 5.24 calls a forward's earlier keys and values `cache`, before it `past_key_values`.
# PEFT's prepare_inputs_for_generation (peft/peft_model.py) looks for the old name alone, finds
# none, and takes every step for the first one. The prefix it then passes under the old name, which
# forward drops because `cache` is given too.
#
# Installs the versions into a new folder, runs them there without fastlora, and says what it saw.
# Ends with 0 while they behave so, with 1 when they no longer do. PYTHON: another interpreter.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip torch==2.13.0+cpu 2>/dev/null || pip torch==2.13.0
pip transformers==5.24.0 peft==0.21.2
# The version before, beside the same packages.
pip --no-deps --target "$folder/before" transformers==5.23.0

cat > "$folder/seen.py" <<'PYTHON'
import sys
import warnings

import peft
import torch
import transformers

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
SAME = 1e-4
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def differences(make):
    """Relative, of generate's logits of three tokens: from forward's, from the base model's, and
    from the base model's with the virtual tokens put in before every step's tokens."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    settings = make(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(base, settings).eval()
    (encoder,) = model.prompt_encoder.values()
    torch.nn.init.normal_(encoder.embedding.weight)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        got = torch.stack(written.logits, 1)[0]
        tokens = written.sequences[:, :-1]
        wants = [m(input_ids=tokens).logits[0, -3:] for m in (model, base)]
        if encoder.embedding.weight.shape[1] == SIZES["hidden_size"]:
            prompt, words = encoder.embedding.weight[None], base.get_input_embeddings()
            steps = [tokens[:, :5], tokens[:, 5:6], tokens[:, 6:7]]
            again = torch.cat([part for step in steps for part in (prompt, words(step))], 1)
            wants.append(base(inputs_embeds=again).logits[0, [8, 13, 18]])
    return [((got - want).norm(dim=1) / want.norm(dim=1)).tolist() for want in wants]


print(f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__}")
found = []
for name in ("PrefixTuningConfig", "PromptTuningConfig"):
    values = differences(getattr(peft, name))
    whats = ("forward's", "the base model's", "a prompt's at every step")
    for what, each in zip(whats, values):
        said = "  ".join(f"{value:.1e}" for value in each)
        print(f"  {name:<18}  generate's logits from {what:<24}  {said}")
    states = zip(("kept", "ignored", "again"), values)
    found.append(next((state for state, each in states if max(each) < SAME), "other"))
    print(f"  {name:<18}  {found[-1]}")
sys.exit(0 if found == sys.argv[1:] else 1)
PYTHON

run() { "$folder/venv/bin/python" "$folder/seen.py" "$@"; }
if run ignored again && PYTHONPATH="$folder/before" run kept kept; then
    echo "As described: 5.24.0 ignores the prefix and repeats the prompt, 5.23.0 keeps both."
else
    echo "The behaviour has changed: expected 'ignored' and 'again', then 'kept' twice." >&2
    exit 1
fi
