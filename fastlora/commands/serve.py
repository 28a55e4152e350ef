"""``fastlora serve``: a model and a folder of adapters over HTTP, in OpenAI's format."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastlora.serving.http.keys import Keys
    from fastlora.serving.http.service import Service

_EXTRA = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "transformers", "jinja2")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serves a local model and PEFT adapters over HTTP as OpenAI's completions and chats, on "
        "this machine alone unless told otherwise. Keys come from --keys FILE, or the environment: "
        "FASTLORA_API_KEY (writes with every adapter), FASTLORA_ADMIN_KEY (loads and unloads)."
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="the model's folder")
    parser.add_argument(
        "--adapters", type=Path, metavar="DIR", help="with a folder for each adapter"
    )
    parser.add_argument("--preload", action="store_true", help="load all adapters at the start")
    parser.add_argument("--name", help="of the base in requests; default: its folder's")
    parser.add_argument("--host", default="127.0.0.1", help="others only with keys")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--host-name",
        action="append",
        default=[],
        metavar="NAME",
        help="that clients call it by, besides localhost; may be repeated",
    )
    parser.add_argument("--keys", type=Path, metavar="FILE", help="JSON, for its owner's eyes only")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the model")
    parser.add_argument("--device", help="default: the GPU, if there is one")
    sizes: dict[str, tuple[int | None, str]] = {
        "max-adapters": (8, "on the device at a time"),
        "max-rank": (64, "of an adapter"),
        "max-rows": (32, "answers that are written at a time"),
        "max-length": (None, "tokens of prompt and answer"),
        "max-prompt": (None, "tokens of a prompt"),
        "max-n": (8, "choices of a request"),
        "max-logprobs": (20, "likeliest tokens beside each"),
        "max-body": (1 << 20, "bytes of a request"),
        "max-requests": (256, "answers that run or wait"),
        "max-requests-per-key": (64, "of them for one key"),
        "max-adapter-bytes": (1 << 30, "of an adapter's weights"),
    }
    for name, (default, what) in sizes.items():
        shown = "" if default is None else f", default {default}"
        parser.add_argument(f"--{name}", type=_parse_count, default=default, help=what + shown)
    parser.add_argument(
        "--max-seconds", type=_parse_seconds, default=600.0, help="of an answer, default 600"
    )
    parser.add_argument(
        "--grace", type=_parse_seconds, default=30.0, help="seconds to finish at the end"
    )


def run_serve(options: argparse.Namespace) -> int:
    """Returns 0 after a signal has stopped it, 2 where it cannot be served."""
    absent = [package for package in _EXTRA if importlib.util.find_spec(package) is None]
    if absent:
        return _refuse(f'{absent[0]} is not installed: pip install "fastlora-kernels[serve]"')
    from fastlora.serving.http.keys import read_keys
    from fastlora.serving.http.server import Server, check_address, listen

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    try:
        keys = read_keys(options.keys, os.environ)
        check_address(options.host, keys)
        listener = listen(options.host, options.port)
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    with listener:
        try:
            service = _make_service(options, keys)
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            return _refuse(str(error))
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host

        def tell() -> None:
            print(f"{service.settings.name} is served at http://{host}:{port}/v1", flush=True)

        Server(service, listener, tell).run_until_stopped()
    return 0


def _make_service(options: argparse.Namespace, keys: Keys) -> Service:
    """Loads the model and opens the folder; nothing is downloaded, no code of the model runs."""
    import transformers

    from fastlora.serving.http.folder import Folder
    from fastlora.serving.http.service import Service
    from fastlora.serving.http.settings import Settings
    from fastlora.serving.model import MultiLoRAModel

    if not options.base.is_dir():
        raise ValueError(f"BASE: expected a model's folder, got {options.base}")
    settings = Settings(
        name=options.name or options.base.resolve().name,
        hosts=Settings.hosts | {name.lower() for name in options.host_name},
        body_bytes=options.max_body,
        prompt_tokens=options.max_prompt,
        choices=options.max_n,
        logprobs=options.max_logprobs,
        under_way=options.max_requests,
        under_way_per_key=min(options.max_requests_per_key, options.max_requests),
        seconds=options.max_seconds,
        grace=options.grace,
        adapter_bytes=options.max_adapter_bytes,
    )
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.base, **local)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.base, dtype=options.dtype, use_safetensors=True, **local
    )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    server = MultiLoRAModel(
        model.to(device).eval(), max_adapters=options.max_adapters, max_rank=options.max_rank
    )
    folder = options.adapters and Folder(options.adapters, settings.adapter_bytes)
    service = Service(
        server,
        tokenizer,
        folder,
        settings,
        keys,
        max_rows=options.max_rows,
        max_length=options.max_length,
    )
    try:
        if options.preload:
            service.adapters.preload()
    except BaseException:
        service.close()
        raise
    return service


def _parse_count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _parse_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}")
    return value


def _refuse(reason: str) -> int:
    print(f"fastlora serve: {reason}", file=sys.stderr)
    return 2
