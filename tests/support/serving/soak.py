"""A server under random clients: what they get is compared, and at the end nothing may be left.

    python -m tests.support.serving.soak [--seconds 300] [--clients 12] [--leavers 1000] [--seed 0]

Clients complete greedily and compare with what the adapter writes alone, stream and leave at any
token, send nonsense; another one unloads adapters and loads them again, as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fastlora.serving.http.keys import Caller, Keys
from tests.support.serving.http_server import NAMES, PATIENCE, Running, running, save_adapters

ADMIN = "administer-" * 3
PROMPTS = [[1 + (31 * i + 7 * j) % 250 for j in range(2 + 3 * i)] for i in range(6)]
LONGEST = 24


class Soak:
    """Runs clients against a server. done: what was asked, by kind; wrong: what was not right."""

    def __init__(self, server: Running, seed: int) -> None:
        self.server, self.seed = server, seed
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._written = {
            (name, row): server.expected(name, prompt, LONGEST)
            for name in (*NAMES, None)
            for row, prompt in enumerate(PROMPTS)
        }

    def run(self, seconds: float, clients: int) -> None:
        end = time.monotonic() + seconds
        work = [self._use] * clients + [self._administer]
        self._run([(each, self.seed + i, end) for i, each in enumerate(work)])

    def leave(self, count: int, at_once: int = 50) -> None:
        """Has so many clients begin a long answer and leave at a random moment of it."""
        for first in range(0, count, at_once):
            some = range(first, min(first + at_once, count))
            self._run([(self._leave, self.seed + 1000 + i, 0.0) for i in some])

    def _run(self, work: list[tuple[Any, int, float]]) -> None:
        def call(each: Any, seed: int, end: float) -> None:
            try:
                each(random.Random(seed), end)
            except Exception as error:
                self.wrong.append(f"{each.__name__}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=call, args=args) for args in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _use(self, draw: random.Random, end: float) -> None:
        while time.monotonic() < end:
            draw.choice([self._complete, self._complete, self._leave, self._misuse])(draw, end)

    def _draw_request(self, draw: random.Random) -> tuple[str | None, int, dict[str, Any]]:
        name, row = draw.choice([*NAMES, None]), draw.randrange(len(PROMPTS))
        body = {"model": name or "tiny", "prompt": PROMPTS[row], "temperature": 0}
        return name, row, {**body, "ignore_eos": True, "logprobs": 0}

    def _complete(self, draw: random.Random, _: float) -> None:
        name, row, body = self._draw_request(draw)
        count, stream = draw.randint(1, LONGEST), draw.random() < 0.5
        answer = self.server.ask("/v1/completions", body | {"max_tokens": count, "stream": stream})
        self.done[f"completed, {answer.status}"] += 1
        if answer.status in (404, 429):  # unloaded at the moment; the queue is full
            return
        if answer.status != 200:
            self.wrong.append(f"{name}: {answer.status} {answer.text[:200]}")
            return
        parts = answer.events if stream else [answer.body]
        choices = [part["choices"][0] for part in parts if part["choices"]]
        if stream and any("error" in part for part in parts):
            self.wrong.append(f"{name}: {answer.text[-200:]}")
            return
        tokens = [t for c in choices if c["logprobs"] for t in c["logprobs"]["tokens"]]
        show = self.server.service.prompts.show
        want = [show(token) for token in self._written[name, row][:count]]
        if tokens != want:
            self.wrong.append(f"{name}, prompt {row}: {tokens}, expected {want}")

    def _leave(self, draw: random.Random, _: float) -> None:
        _, _, body = self._draw_request(draw)
        body |= {"max_tokens": 800, "stream": draw.random() < 0.7, "n": draw.randint(1, 2)}
        with closing(self.server.connect()) as connection:
            head = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            if body["stream"]:
                response = connection.getresponse()
                for _ in range(draw.randrange(4)):
                    response.readline()
            else:
                time.sleep(draw.random() / 20)
        self.done["left"] += 1

    def _misuse(self, draw: random.Random, _: float) -> None:
        wrong = ["{", "[]", '{"model": "nobody", "prompt": "x"}', '{"model": "alice"}', "\x00" * 9]
        answer = self.server.ask("/v1/completions", draw.choice(wrong))
        self.done[f"misused, {answer.status}"] += 1
        if answer.status not in (400, 404):
            self.wrong.append(f"misuse: {answer.status} {answer.text[:200]}")

    def _administer(self, draw: random.Random, end: float) -> None:
        key = {"Authorization": f"Bearer {ADMIN}"}
        while time.monotonic() < end:
            name = draw.choice(NAMES)
            out = self.server.ask("/v1/unload_lora_adapter", {"lora_name": name}, **key)
            time.sleep(draw.random() / 20)
            again = {"lora_name": name, "lora_path": name}
            back = self.server.ask("/v1/load_lora_adapter", again, **key)
            self.done[f"reloaded, {out.status}, {back.status}"] += 1
            if (out.status, back.status) != (200, 200):
                self.wrong.append(f"{name}: {out.text[:200]} {back.text[:200]}")
            time.sleep(draw.random() / 5)

    def list_leftovers(self) -> list[str]:
        """What is still there once all clients have gone: nothing, after a moment."""
        service = self.server.service
        scheduler = service.engine._loop.scheduler
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            left = {
                "answers under way": service.limits.total,
                "writings": len(service._running),
                "rows": len(scheduler.running) + len(scheduler.waiting),
                "leases": service.engine._server.bank.stats().leases,
            }
            if not any(left.values()):
                return []
            time.sleep(0.05)
        return [f"{count} {name}" for name, count in left.items() if count]


def run(seconds: float, clients: int, leavers: int, seed: int, folder: Path) -> Soak:
    """A soak, with what was wrong or left over in ``wrong``."""
    save_adapters(folder)
    keys = Keys([(ADMIN, Caller("admin", writes=False, administers=True))])
    with running(folder, keys, rows=8, under_way=256) as server:
        soak = Soak(server, seed)
        soak.run(min(seconds, 1.0), clients)  # what is made once stays
        handles = len(os.listdir("/proc/self/fd"))
        soak.run(seconds, clients)
        soak.leave(leavers)
        soak.wrong += soak.list_leftovers()
        end = time.monotonic() + 10
        while len(os.listdir("/proc/self/fd")) > handles + 8 and time.monotonic() < end:
            time.sleep(0.1)
        if len(os.listdir("/proc/self/fd")) > handles + 8:
            soak.wrong.append(f"{len(os.listdir('/proc/self/fd'))} handles, {handles} before")
    return soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"seconds": 300, "clients": 12, "leavers": 1000, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soak = run(args.seconds, args.clients, args.leavers, args.seed, Path(folder))
    for kind, count in sorted(soak.done.items()):
        print(f"{count:8d} {kind}")
    for what in soak.wrong[:20]:
        print("WRONG", what)
    print(f"{len(soak.wrong)} wrong")
    return bool(soak.wrong)


if __name__ == "__main__":
    raise SystemExit(main())
