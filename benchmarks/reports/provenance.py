"""Where, when and with what a folder's figures were measured, run by run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.harness.lines import Line
from benchmarks.reports.markdown import said, span, table
from benchmarks.reports.standing import run_of

_UNITS = {"mhz": "MHz", "memory_mhz": "memory MHz", "limit_mhz": "at most MHz", "watts": "W"}


def device(found: Iterable[Line]) -> str:
    """``AMD EPYC, 2 threads``; several where figures of several are in the folder."""
    names = {_where(line): None for line in found if line.get("device_name")}
    return " / ".join(names) or "unknown device"


def section(found: Sequence[Line]) -> list[str]:
    """What all runs share, then a row for every run."""
    measured = [line for line in found if line.get("device_name")]
    parts = ["## Measured on"]
    if not measured:
        return [*parts, "Unknown: no process lived to say so."]
    runs: dict[tuple, list[Line]] = {}
    for line in measured:
        runs.setdefault(run_of(line), []).append(line)
    ordered = sorted(runs.values(), key=lambda lines: min(line["timestamp"] for line in lines))
    if len(ordered) > 1:
        parts.append(
            f"**The figures are of {len(ordered)} runs**; ratios are formed within a run, and only "
            "figures of one run are compared."
        )
    heading = ["run", "when (UTC)", "commit", "cases", "bandwidth, GB/s", "products, TFLOP/s"]
    rows = [[str(i), *_run(lines)] for i, lines in enumerate(ordered, 1)]
    parts += [
        table(["", ""], _facts(measured), left=2),
        table([*heading, "clocks and load"], rows, left=7),
    ]
    methods = dict.fromkeys(line["method"] for line in measured if line.get("method"))
    return parts + [f"Method: {said(method, None)}." for method in methods]


def _where(line: Line) -> str:
    threads = line.get("threads")
    name, host = str(line["device_name"]).strip(), "" if line["device"] == "cpu" else "host "
    if line["device"] == "cpu" and line.get("instruction_set"):  # older lines do not say
        name += f" ({line['instruction_set']})"
    return f"{name}, {threads} {host}thread{'s' if threads != 1 else ''}"


def _facts(measured: Sequence[Line]) -> list[list[str]]:
    """Rows of what the lines say, with every value that they say."""
    rows = [["device", device(measured)]]
    names = dict.fromkeys(name for line in measured for name in line.get("versions") or {})
    absent = []
    for name in names:
        values = _all(((line.get("versions") or {}).get(name) for line in measured), "not there")
        if values == "not there":
            absent.append(name)
        else:
            rows.append([name, values])
    rows += [["not installed", ", ".join(absent)]] if absent else []
    rows.append(["fastlora's backend", _all(line.get("backend") for line in measured)])
    rows.append(["seed", _all(line.get("seed") for line in measured)])
    rounds = [line["rounds"] for line in measured if line.get("rounds")]
    rows += [["rounds a case", span(rounds)]] if rounds else []
    quick = len({line["case"] for line in measured if line.get("quick")})
    rows += [["cases measured in haste (`--quick`)", str(quick)]] if quick else []
    return rows


def _all(values: Iterable[object], missing: str = "unknown") -> str:
    return ", ".join(dict.fromkeys(missing if v is None else str(v) for v in values))


def _run(lines: Sequence[Line]) -> list[str]:
    times = sorted(line["timestamp"] for line in lines)
    first, last = (time[:16].replace("T", " ") for time in (times[0], times[-1]))
    # A day's second time needs no date.
    last = last[11:] if last[:10] == first[:10] else last
    when = first if first.endswith(last) else f"{first} to {last}"
    ceilings = lines[0].get("ceilings") or {}
    bandwidth = ceilings.get("bandwidth")
    products = [f"{k} {v / 1e12:.3g}" for k, v in (ceilings.get("flops") or {}).items()]
    return [
        when,
        _commit(lines[0].get("commit")),
        str(len({line["case"] for line in lines})),
        f"{bandwidth / 1e9:.4g}" if bandwidth else "-",
        ", ".join(products) or "-",
        _clocks(lines),
    ]


def _commit(commit: str | None) -> str:
    if not commit:
        return "unknown"
    head, plus, changes = commit.partition("+")
    return f"{head[:12] if ' ' not in head else head}{plus}{changes}"


def _clocks(lines: Sequence[Line]) -> str:
    """From the least to the greatest of the run's cases; what is no number as it was said."""
    found: dict[str, dict] = {}
    for line in lines:
        for name, value in (line.get("clocks") or {}).items():
            found.setdefault(name, {})[value] = None
    parts = []
    for name, values in found.items():
        numbers = [value for value in values if isinstance(value, (int, float))]
        words = [said(value) for value in values if isinstance(value, str)]
        shown = ([span(numbers, 4)] if numbers else []) + words
        unit = _UNITS.get(name)
        text = ", ".join(shown)
        parts.append(f"{text} {unit}" if unit else f"{name} {text}")
    return "; ".join(parts) or "-"
