"""``python -m benchmarks.tables.vllm``: a step of vLLM's with adapters, beside one without.

Processes of vLLM, started once and told in turn to run a round: without LoRA (the base of ratios;
and compiled), with vLLM's own LoRA, with fastlora's plug-in. A round is one step that reads 32
prompts of 32 tokens and 24 steps that write, with 0, 1, 8 or 32 adapters among the requests; each
step is timed on the wall. First every one of them must give each prompt's next token the
log-probabilities that transformers and PEFT give it. Prints Markdown. Runs in the environment of
``make test-vllm``; elsewhere it says that vLLM is not installed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

KINDS = {
    "base": {},
    "base-compiled": {"compiled": True},
    "vllm": {"lora": True},
    "fastlora": {"lora": True, "plugin": True},
    "fastlora-compiled": {"lora": True, "plugin": True, "compiled": True},
}
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6}
SIZES |= {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 1000}
ROWS, PROMPT, STEPS, ADAPTERS = 32, 32, 24, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of a log-probability in bfloat16, beyond twice PEFT's own distance from float32.
SLACK = 2e-2


def make_world(folder: Path, rank: int) -> Any:
    """Writes a model of random weights and its adapters; returns the model, in bfloat16."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=512, initializer_range=0.03)
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    base.save_pretrained(folder / "base")
    of_adapter = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    model = peft.get_peft_model(copy.deepcopy(base), of_adapter)
    for i in range(ADAPTERS):
        torch.manual_seed(1 + i)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.02
        model.save_pretrained(folder / f"a{i}")
    return base


def make_prompts(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 1000) for _ in range(PROMPT)] for _ in range(ROWS)]


class Process:
    """vLLM of one kind; ``run`` has it run a round and returns each step's seconds."""

    def __init__(self, kind: str, folder: Path, threads: int, highest: int) -> None:
        how = KINDS[kind]
        variables = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
        variables |= {"FASTLORA_VLLM": "1" if how.get("plugin") else "0"}
        variables |= {"FASTLORA_VLLM_COMPILE": "1" if how.get("compiled") else "0"}
        self.log = folder / f"{kind}.log"
        command = [sys.executable, "-m", __spec__.name, "--child", json.dumps(how)]
        command += ["--folder", str(folder), "--highest", str(highest)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=self.log.open("w"), env={**os.environ, **variables},
        )  # fmt: skip
        self._read()

    def run(self, adapters: int, seed: int, check: bool = False) -> Any:
        print(json.dumps([adapters, seed, check]), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended: {self.log.read_text()[-2000:]}")
        return json.loads(line)


def run_child(folder: Path, how: dict[str, bool], highest: int) -> None:
    """Serves rounds: reads what to run from standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_loras": ADAPTERS, "max_cpu_loras": ADAPTERS}
    lora |= {"max_lora_rank": highest}
    llm = LLM(
        str(folder / "base"), dtype="bfloat16", enforce_eager=not how.get("compiled"),
        max_model_len=256, max_num_seqs=ROWS, max_num_batched_tokens=2048,
        enable_prefix_caching=False, skip_tokenizer_init=True, **(lora if how.get("lora") else {}),
    )  # fmt: skip
    engine = llm.llm_engine
    print(json.dumps("ready"), file=answers, flush=True)
    for count, line in enumerate(sys.stdin):
        adapters, seed, check = json.loads(line)
        params = SamplingParams(
            temperature=0, max_tokens=1 if check else 1 + STEPS, ignore_eos=True,
            logprobs=0 if check else None, detokenize=False,
        )  # fmt: skip
        for row, prompt in enumerate(make_prompts(seed)):
            own = None
            if how.get("lora") and adapters:
                slot = row % adapters
                own = LoRARequest(f"a{slot}", slot + 1, str(folder / f"a{slot}"))
            engine.add_request(
                f"{count}-{row}", {"prompt_token_ids": prompt}, params, lora_request=own
            )
        seconds, found = [], {}
        while engine.has_unfinished_requests():
            began = time.perf_counter()
            done = engine.step()
            seconds.append(time.perf_counter() - began)
            found |= {int(o.request_id.split("-")[1]): o.outputs[0] for o in done if o.finished}
        tokens = [found[row].token_ids[0] for row in range(ROWS)]
        likely = [found[row].logprobs[0][t].logprob for row, t in enumerate(tokens)] if check else 0
        print(json.dumps([tokens, likely] if check else seconds), file=answers, flush=True)


def check(processes: dict[str, Process], base: Any, folder: Path) -> dict[str, float]:
    """Each kind's worst distance from PEFT in float32; RuntimeError where that is too far."""
    import peft

    worst = {}
    for kind, process in processes.items():
        adapters = 4 if KINDS[kind].get("lora") else 0
        tokens, likely = process.run(adapters, seed=7, check=True)
        got, places = torch.tensor(likely), torch.arange(ROWS)
        want, theirs = torch.empty(ROWS, 1000), torch.empty(ROWS, 1000)
        prompts = torch.tensor(make_prompts(7))
        for slot in range(max(adapters, 1)):
            rows = places % max(adapters, 1) == slot
            model = copy.deepcopy(base)
            if adapters:
                model = peft.PeftModel.from_pretrained(model, str(folder / f"a{slot}"))
            for out, dtype in ((theirs, torch.bfloat16), (want, torch.float32)):
                with torch.no_grad():
                    logits = model.to(dtype)(prompts[rows]).logits[:, -1]
                out[rows] = logits.float().log_softmax(-1)
        own = float((theirs - want).abs().max())
        worst[kind] = float((got - want[places, tokens]).abs().max())
        if not worst[kind] <= 2 * own + SLACK:
            raise RuntimeError(
                f"{kind}: {worst[kind]:.3f} from PEFT in float32, PEFT's own {own:.3f}"
            )
    return worst


def measure(processes: dict[str, Process], used: Sequence[int], rounds: int) -> None:
    """Prints a row for each kind and number of adapters: medians, and ratios to the base."""
    from benchmarks.harness.timer import compute_ratios, compute_spread

    print("| adapters in the batch | | prefill, ms | over the base | decode step, ms | over |")
    print("|---|---|---|---|---|---|")
    for adapters in used:
        times: dict[str, list[list[float]]] = {kind: [] for kind in processes}
        for turn in range(-1, rounds):
            for kind in random.sample(list(processes), len(processes)):
                seconds = processes[kind].run(adapters, seed=100 + turn)
                if turn >= 0:  # adapters are loaded in the first one
                    steps = compute_spread(seconds[1:])["p50"]
                    times[kind].append([1e3 * seconds[0], 1e3 * steps])
        base = list(zip(*times["base"], strict=True))
        for kind in processes:
            cells = []
            for own, of_base in zip(zip(*times[kind], strict=True), base, strict=True):
                ratio = compute_spread(compute_ratios(list(own), list(of_base)))["p50"]
                cells += [f"{compute_spread(list(own))['p50']:.1f}", f"{ratio:.2f}"]
            print(f"| {adapters} | {kind} | {' | '.join(cells)} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32])
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--highest", type=int, default=16, help="vLLM's max_lora_rank")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if importlib.util.find_spec("vllm") is None:
        print("vllm is not installed here; `make test-vllm` makes an environment that has it")
        return 2
    if args.child is not None:
        run_child(args.folder, args.child, args.highest)
        return 0
    from benchmarks.harness import machine

    kinds = ["base", *(kind for kind in args.kinds if kind != "base")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_world(folder, args.rank)
        processes = {kind: Process(kind, folder, args.threads, args.highest) for kind in kinds}
        worst = check(processes, base, folder)
        device = machine.find_device_name("cpu")
        print(f"{device}, {args.threads} thread(s), Python {platform.python_version()}")
        print(f"rank {args.rank}, max_lora_rank {args.highest}, {args.rounds} rounds")
        print("log-probabilities from PEFT's in float32, at most:", end=" ")
        print(", ".join(f"{kind} {error:.4f}" for kind, error in worst.items()))
        measure(processes, args.adapters, args.rounds)
        for process in processes.values():
            process.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
