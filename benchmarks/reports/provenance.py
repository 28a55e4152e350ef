"""Provenance of a folder's figures, run by run: device, time, versions, load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.harness.lines import Line
from benchmarks.reports.comparison import identify_run
from benchmarks.reports.markdown import format_span, make_table, shorten

_UNITS = {"mhz": "MHz", "memory_mhz": "memory MHz", "limit_mhz": "at most MHz", "watts": "W"}


def name_devices(lines: Iterable[Line]) -> str:
    """Names the devices of the lines, as ``AMD EPYC, 2 threads``."""
    names = {_describe_device(line): None for line in lines if line.get("device_name")}
    return " / ".join(names) or "unknown device"


def write_section(lines: Sequence[Line]) -> list[str]:
    """Writes what all runs share, then a row for every run."""
    measured = [line for line in lines if line.get("device_name")]
    parts = ["## Measured on"]
    if not measured:
        return [*parts, "Unknown: no process lived to say so."]
    runs: dict[tuple, list[Line]] = {}
    for line in measured:
        runs.setdefault(identify_run(line), []).append(line)
    ordered = sorted(
        runs.values(), key=lambda run_lines: min(line["timestamp"] for line in run_lines)
    )
    if len(ordered) > 1:
        parts.append(
            f"**The figures are of {len(ordered)} runs**; ratios are formed within a run, and only "
            "figures of one run are compared."
        )
    heading = ["run", "when (UTC)", "commit", "cases", "bandwidth, GB/s", "products, TFLOP/s"]
    rows = [[str(i), *_make_run_row(run_lines)] for i, run_lines in enumerate(ordered, 1)]
    parts += [
        make_table(["", ""], _make_fact_rows(measured), word_columns=2),
        make_table([*heading, "clocks and load"], rows, word_columns=7),
    ]
    methods = dict.fromkeys(line["method"] for line in measured if line.get("method"))
    return parts + [f"Method: {shorten(method, None)}." for method in methods]


def _describe_device(line: Line) -> str:
    threads = line.get("threads")
    name, host = str(line["device_name"]).strip(), "" if line["device"] == "cpu" else "host "
    if line["device"] == "cpu" and line.get("instruction_set"):  # older lines do not say
        name += f" ({line['instruction_set']})"
    return f"{name}, {threads} {host}thread{'s' if threads != 1 else ''}"


def _make_fact_rows(measured: Sequence[Line]) -> list[list[str]]:
    """Makes rows of the lines' facts, with every value of each."""
    rows = [["device", name_devices(measured)]]
    names = dict.fromkeys(name for line in measured for name in line.get("versions") or {})
    absent = []
    for name in names:
        values = _join_values(
            ((line.get("versions") or {}).get(name) for line in measured), "not there"
        )
        if values == "not there":
            absent.append(name)
        else:
            rows.append([name, values])
    rows += [["not installed", ", ".join(absent)]] if absent else []
    rows.append(["fastlora's backend", _join_values(line.get("backend") for line in measured)])
    rows.append(["seed", _join_values(line.get("seed") for line in measured)])
    rounds = [line["rounds"] for line in measured if line.get("rounds")]
    rows += [["rounds a case", format_span(rounds)]] if rounds else []
    quick = len({line["case"] for line in measured if line.get("quick")})
    rows += [["cases measured in haste (`--quick`)", str(quick)]] if quick else []
    return rows


def _join_values(values: Iterable[object], missing: str = "unknown") -> str:
    return ", ".join(dict.fromkeys(missing if v is None else str(v) for v in values))


def _make_run_row(lines: Sequence[Line]) -> list[str]:
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
        _shorten_commit(lines[0].get("commit")),
        str(len({line["case"] for line in lines})),
        f"{bandwidth / 1e9:.4g}" if bandwidth else "-",
        ", ".join(products) or "-",
        _format_clocks(lines),
    ]


def _shorten_commit(commit: str | None) -> str:
    if not commit:
        return "unknown"
    head, plus, changes = commit.partition("+")
    return f"{head[:12] if ' ' not in head else head}{plus}{changes}"


def _format_clocks(lines: Sequence[Line]) -> str:
    """Formats clocks from the least to the greatest of the run's cases; text as it is."""
    values_of: dict[str, dict] = {}
    for line in lines:
        for name, value in (line.get("clocks") or {}).items():
            values_of.setdefault(name, {})[value] = None
    parts = []
    for name, values in values_of.items():
        numbers = [value for value in values if isinstance(value, (int, float))]
        words = [shorten(value) for value in values if isinstance(value, str)]
        shown = ([format_span(numbers, 4)] if numbers else []) + words
        unit = _UNITS.get(name)
        text = ", ".join(shown)
        parts.append(f"{text} {unit}" if unit else f"{name} {text}")
    return "; ".join(parts) or "-"
