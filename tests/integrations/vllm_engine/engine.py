"""vLLM in a process of its own, told what to do by lines of JSON; as a script it is that process.

With and without the plug-in, which a process decides at its start.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

# Longer than vLLM takes to start, compiling included, on a busy machine.
SECONDS = 120


def environment(**more: str) -> dict[str, str]:
    """Of a process of vLLM's that reaches for nothing outside of this machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTLORA", "PYTHONPATH"))}
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {**kept, **offline, "OMP_NUM_THREADS": "1", **more}


class Engine:
    """An ``LLM`` of vLLM's. options: as its own; log: a file for what it prints.

    own: vLLM's own LoRA in place of the plug-in's. apart: vLLM's engine in further processes.
    """

    def __init__(
        self, model: Path, log: Path, own: bool = False, apart: bool = False, **options: Any
    ) -> None:
        variables = {"FASTLORA_VLLM": "0"} if own else {}
        variables |= options.pop("variables", {})
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(apart))
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(model), json.dumps(options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env=environment(**variables), cwd=log.parent,
            )  # fmt: skip
        self.options: dict[str, Any] = {}
        try:
            self.options = self._read()
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: list[list[int]], adapters: list[str | None], **sampling: Any
    ) -> list[dict[str, Any]]:
        """Greedy tokens, log-probability of each, and of the prompt where they are asked for.

        adapters: a folder a prompt, None for the base; the number of each is vLLM's to remember.
        """
        return self._ask(op="generate", prompts=prompts, adapters=adapters, sampling=sampling)

    def load(self, folder: str) -> None:
        self._ask(op="load", folder=folder)

    def replace(self, name: str, folder: str) -> None:
        """Loads another adapter under a name that has been used, in the place of what it was."""
        self._ask(op="replace", name=name, folder=folder)

    def forget(self, name: str) -> None:
        self._ask(op="forget", name=name)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, **what: Any) -> Any:
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        ready, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            raise RuntimeError(
                f"vLLM ended, or said nothing for {SECONDS} s: {self.log.read_text()[-3000:]}"
            )
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


class Served:
    """The child's side: the engine and the numbers by which it knows adapters."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from vllm import LLM

        options = {"max_model_len": 128, "max_num_seqs": 16, "enforce_eager": True, **options}
        lora = {"enable_lora": True, "max_cpu_loras": 32} if "max_loras" in options else {}
        self.llm = LLM(model, seed=0, enable_prefix_caching=False, **{**lora, **options})
        self.numbers: dict[str, int] = {}
        self._unused = itertools.count(1)

    def request(self, folder: str | None, **how: Any) -> Any:
        from vllm.lora.request import LoRARequest

        if folder is None:
            return None
        number = self.numbers.get(folder) or next(self._unused)
        self.numbers[folder] = number
        return LoRARequest(folder, number, folder, **how)

    def generate(self, prompts: Any, adapters: Any, sampling: dict[str, Any]) -> list[Any]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, logprobs=0, ignore_eos=True, **sampling)
        done = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False,
            lora_request=[self.request(folder) for folder in adapters],
        )  # fmt: skip
        return [self.describe(output, ids) for output, ids in zip(done, prompts, strict=True)]

    def describe(self, output: Any, prompt: list[int]) -> dict[str, Any]:
        tokens = list(output.outputs[0].token_ids)
        of = zip(output.outputs[0].logprobs, tokens, strict=True)
        found = {"tokens": tokens, "logprobs": [each[token].logprob for each, token in of]}
        if output.prompt_logprobs:
            pairs = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
            found["prompt_logprobs"] = [each[token].logprob for each, token in pairs]
        return found

    def load(self, folder: str) -> None:
        self.llm.llm_engine.add_lora(self.request(folder))

    def replace(self, name: str, folder: str) -> None:
        from vllm.lora.request import LoRARequest

        number = self.numbers[name]
        self.llm.llm_engine.add_lora(LoRARequest(name, number, folder, load_inplace=True))

    def forget(self, name: str) -> None:
        self.llm.llm_engine.remove_lora(self.numbers.pop(name))


def main(model: str, options: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints

    def answer(what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    served = Served(model, json.loads(options))
    answer({})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer(getattr(served, asked.pop("op"))(**asked))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(*sys.argv[1:])
