"""``fastlora demo``: LoRA at work on real text in transformers, checked against PEFT.

corpora.py  the text                        compare.py   full, last layer, LoRA; PEFT beside us
model.py    the base model                  adapters.py  four adapters, reopened, on every domain
methods.py  the ways to fine-tune it        serve.py     all of them in one batch
training.py a run and its measurements      merge.py     into the weights and out again
claims.py   what is asserted                chapters.py  all of it in order
screen.py   what is printed                 settings.py  sizes, rates, shared state
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

NEEDS = ("accelerate", "peft", "psutil", "rich", "tokenizers", "transformers")


def run(
    model: str | None = None, data: str | None = None, *, quick: bool = False, seed: int = 0
) -> int:
    """Runs the demo, prints what it measures, and returns 0 when all its claims hold.

    A small Llama is pre-trained on text that comes with CPython, then fine-tuned on four domains:
    by full fine-tuning, a part of the model and LoRA on the first, by LoRA on the others. The
    adapters are compared with PEFT's, reopened in PEFT, tried on every domain, served in one batch,
    merged and unmerged.

    model: a directory with a causal language model and its tokenizer, to fine-tune instead of the
    small Llama. data: a text file to fine-tune on instead of the four domains. With either, how
    well a method learns is shown but not claimed, and with one domain there is no matrix; full
    fine-tuning is left out where it would not fit in memory. quick: toy sizes in half a minute,
    whose claims are those about exactness. Nothing is downloaded.

    Returns 1 when a claim fails, 2 when a package is missing or an input cannot be used, which one
    line on stderr explains.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes, which PEFT imports where it is, looks for a package that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from fastlora.demo import chapters
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDS:
            raise
        print(
            f"fastlora demo: needs {error.name}; in a checkout of fastlora, `pip install .[demo]`",
            file=sys.stderr,
        )
        return 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' advice is not what one came to read
        try:
            scene = chapters.prepare(model, data, quick=quick, seed=seed)
        except (OSError, ValueError) as error:
            print(f"fastlora demo: {error}", file=sys.stderr)
            return 2
        return chapters.tell(scene)
