"""``fastlora merge``: adapters into a model's files, with each layer's fidelity."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from fastlora.commands.progress import Progress
from fastlora.config.listing import list_some
from fastlora.functional.fidelity import Fidelity
from fastlora.merge_files import Merged, durable, journal, merge_folder

DTYPES = {
    name: dtype
    for dtype, names in {
        torch.float32: ("float32", "fp32"),
        torch.float16: ("float16", "fp16"),
        torch.bfloat16: ("bfloat16", "bf16"),
        torch.float64: ("float64", "fp64"),
    }.items()
    for name in names
}
# How many layers of the least gain are printed; the report file has all.
_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Merges PEFT adapters into a local model's safetensors, written to a new folder with its "
        "config, tokenizer and whatever else it holds. The same command resumes a run that was "
        "stopped."
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="the model's folder, only read")
    parser.add_argument(
        "adapters",
        type=parse_adapter,
        nargs="+",
        metavar="ADAPTER[=weight]",
        help="an adapter's folder and what to multiply it by, 1 by default",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged model; default: the base's")
    parser.add_argument(
        "--allow-partial", action="store_true", help="leave out layers that have no counterpart"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write every layer's fidelity there, as JSON"
    )


def parse_adapter(text: str) -> tuple[str, float]:
    """Parses ``folder`` or ``folder=weight``; the weight is a number after the last =."""
    folder, sign, last = text.rpartition("=")
    if sign and Path(text).is_dir():
        if Path(folder).is_dir():
            raise argparse.ArgumentTypeError(
                f"{text} and {folder} are folders both: expected a weight after it, {text}=1"
            )
        return text, 1.0
    try:
        weight = float(last)
    except ValueError:
        return text, 1.0
    return (folder, weight) if sign else (text, 1.0)


def run_merge(options: argparse.Namespace) -> int:
    """Returns 0 when merged, 1 when the disk failed, 2 for what cannot be merged, 130 on Ctrl-C."""
    report: Path | None = options.report
    if report is not None and (
        report.is_dir() or not os.access(report.absolute().parent, os.W_OK | os.X_OK)
    ):
        return _fail(f"--report: expected a file in a folder to write to, got {report}", 2)
    try:
        with closing(_Bar()) as bar:
            merged = merge_folder(
                options.base,
                options.adapters,
                options.out,
                dtype=DTYPES.get(options.dtype),
                allow_partial=options.allow_partial,
                watch=bar.show,
            )
        print(summarize(merged, options.out))
        if report is not None:
            try:
                durable.write(report, [_as_json(merged)])
            except OSError as error:
                return _fail(f"merged, but without the report: {_explain_error(error)}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted" + _suggest_resuming(options.out), 130)
    except (FileNotFoundError, FileExistsError, BlockingIOError, PermissionError) as error:
        return _fail(_explain_error(error), 2)
    except OSError as error:
        return _fail(_explain_error(error) + _suggest_resuming(options.out), 1)
    except (TypeError, ValueError, RuntimeError) as error:
        return _fail(str(error), 2)
    return 0


def summarize(merged: Merged, out: Path) -> str:
    """Says what was written and what was left out, with a table of fidelity."""
    size = f"{merged.nbytes / 1e9:.3g} GB" if merged.nbytes > 1e6 else f"{merged.nbytes} bytes"
    lines = [f"merged {len(merged.fidelity)} layers into {out}, {size} of weights"]
    lines += [f"{len(merged.kept)} files were whole from before"] if merged.kept else []
    lines += [f"left out: {line}" for line in merged.skipped]
    lines += [f"from the adapter: {line}" for line in merged.vocabulary]
    if merged.others.weights:
        lines.append(f"copied as they are: {list_some(merged.others.weights)}")
    lines += [f"note: {note}" for note in merged.others.notes()]
    layers = sorted(merged.fidelity.items(), key=lambda item: item[1].gain)
    columns = [list(column) for column in zip(*(_list_columns(f) for _, f in layers), strict=True)]
    rows = [(layer, _list_columns(fidelity)) for layer, fidelity in layers[:_SHOWN]]
    if len(layers) > 1:
        rows.append((f"median of {len(layers)}", tuple(map(statistics.median, columns))))
    width = max(len(layer) for layer, _ in rows)
    lines.append(f"{'lowest gain':<{width}}   gain    error  changed  |d|/|W|")
    for layer, (gain, error, changed, relative) in rows:
        lines.append(
            f"{layer:<{width}}  {gain:5.3f}  {error:7.1e}  {changed:7.1%}  {relative:7.1e}"
        )
    warning = merged.warning()
    return "\n".join(lines + ([f"warning: {warning}"] if warning else []))


def _list_columns(fidelity: Fidelity) -> tuple[float, float, float, float]:
    return fidelity.gain, fidelity.error, fidelity.changed, fidelity.size


def _as_json(merged: Merged) -> bytes:
    values = {
        "skipped": merged.skipped,
        "files left out": dict(merged.others.left),
        "weights copied as they are": [*merged.others.weights, *merged.others.unmerged],
        "low": merged.low,
        "layers": {layer: asdict(fidelity) for layer, fidelity in merged.fidelity.items()},
    }
    return json.dumps(values, indent=2).encode() + b"\n"


def _suggest_resuming(out: Path) -> str:
    return "; the same command resumes it" if journal.is_unfinished(out) else ""


def _explain_error(error: OSError) -> str:
    # str(error) would put the number before our own texts, too.
    return str(error) if error.filename or not error.strerror else error.strerror


def _fail(text: str, code: int) -> int:
    print(f"fastlora merge: {text}", file=sys.stderr)
    return code


class _Bar:
    """Progress bar of the command, a step a file."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._file = ""

    def show(self, file: str, files: int, share: float) -> None:
        if self._bar is None:
            self._bar = Progress("merging", files).__enter__()
        if file != self._file:
            self._file = file
            self._bar.step(file)
        self._bar.advance_within(share)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
