"""A batch in which every row has its own adapter: tokens a second beside PEFT and the base model.

A Llama of random weights and adapters is enough: what is measured is the machinery. In float32 both
libraries must generate the same tokens, or nothing is timed.

    python examples/generate_mixed.py [--rows 16] [--adapters 8] [--hidden 512] [--dtype float32]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

import fastlora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(options: argparse.Namespace) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=5 * options.hidden // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=2048,
    )
    return transformers.LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()


def add_peft(base: nn.Module, names: list[str], r: int) -> peft.PeftModel:
    """Adds the adapters, with random weights that change what is generated."""
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS)
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def make_server(base: nn.Module, model: peft.PeftModel, names: list[str], r: int):
    """Makes a server of the same adapters, read from their files."""
    server = fastlora.MultiLoRAModel(
        copy.deepcopy(base), max_adapters=len(names), max_rank=r, target_modules=TARGETS
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in names:
            server.load_adapter(Path(folder) / name, adapter_name=name)
    return server


def race(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Times each call in turns; returns median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 16")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="that each row generates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    names = [f"adapter{i}" for i in range(options.adapters)]
    base = make_base(options)
    theirs = add_peft(base, names, options.rank)
    ours = make_server(base, theirs, names, options.rank)
    ids = torch.randint(2048, (options.rows, 8))
    mask = torch.ones_like(ids)
    mixed = [names[i % len(names)] for i in range(options.rows)]
    settings = {
        "attention_mask": mask,
        "max_new_tokens": options.tokens,
        "min_new_tokens": options.tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    calls = {
        "base": lambda: base.generate(ids, **settings),
        "peft": lambda: theirs.generate(input_ids=ids, adapter_names=mixed, **settings),
        "fastlora": lambda: ours.generate(ids, adapter_names=mixed, **settings),
    }
    tokens = {name: call() for name, call in calls.items()}
    same = (tokens["peft"] == tokens["fastlora"]).float().mean().item()
    if options.dtype == "float32" and same < 1:
        raise SystemExit(f"PEFT and fastlora agree in {same:.1%} of the tokens only")
    if torch.equal(tokens["base"], tokens["fastlora"]):
        raise SystemExit("the adapters change nothing: there is nothing to measure")

    seconds = race(calls, options.rounds)
    backend = fastlora.backend("multi_lora_linear")
    print(
        f"{options.rows} rows, {options.adapters} adapters of rank {options.rank}, hidden size "
        f"{options.hidden}, {options.dtype}, {options.threads} threads, backend {backend}; "
        f"{same:.1%} of the tokens are PEFT's"
    )
    for name, time_taken in seconds.items():
        rate = options.rows * options.tokens / time_taken
        print(
            f"{name:<9} {rate:7.0f} tokens/s   {seconds['peft'] / time_taken:5.2f} x PEFT   "
            f"{seconds['base'] / time_taken:5.2f} x base"
        )


if __name__ == "__main__":
    main()
