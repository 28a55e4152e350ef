"""Plots are drawn where there are timings, always in the same style."""

import math

import pytest

from benchmarks.reports import comparison, report
from benchmarks.reports.plots import style as plot_style
from tests.benchmarks.result_lines import CASE, line, not_timed, write_lines


def suites():
    """Lines of every kind of picture: three places in x, a provider far off, a case without."""
    linear = [
        line(p, f * 0.98, f, f * 1.03, case=CASE.replace("M1", f"M{M}"))
        for M in (1, 16, 512)
        for p, f in (("base", 1.0), ("torch", 1.1), ("fastlora", 0.9 + M / 1000), ("new", 40.0))
    ]
    linear.append(not_timed("peft", "absent", "cannot be imported"))
    names = [f"multi-decode-bf16-T{T}-K64-N64-R4-S{S}" for T in (8, 32) for S in (1, 8)]
    multi = [
        line(p, f, f, f, case=name, suite="multi")
        for name in names
        for p, f in (("base", 1.0), ("fastlora", 1.2), ("two_pass", 1.3))
    ]
    case = "merge-bf16-K64-N64-R4"
    merge = [line(p, f, f, f, case=case, suite="merge") for p, f in (("base", 1), ("fastlora", 2))]
    return {"linear": linear, "multi": multi, "merge": merge}


def test_report_shows_pictures_of_all_suites(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the pictures")
    for suite, lines in suites().items():
        write_lines(tmp_path, *lines, suite=suite)
    markdown, *pictures = report.write(tmp_path)
    names = ["linear.png", "multi.png", "merge-bandwidth.png", "roofline.png"]
    assert sorted(path.name for path in pictures) == sorted(names)
    for path in pictures:
        assert f"]({path.name})" in markdown.read_text()
        assert 5_000 < path.stat().st_size < 150_000
        with image.open(path) as drawn:
            assert drawn.width == 1100
            # fastlora's colour is there, and the page is not painted over.
            colours = {c: n for n, c in drawn.convert("RGB").getcolors(1 << 24)}
        blue = (0x00, 0x72, 0xB2)
        near = [n for c, n in colours.items() if math.dist(c, blue) < 16]
        assert sum(near) > 30
        assert max(colours, key=colours.get) == (255, 255, 255)
    again = {path.name: path.read_bytes() for path in pictures}
    assert {path.name: path.read_bytes() for path in report.write(tmp_path)[1:]} == again


@pytest.mark.parametrize("suite, expected", [("linear", 2), ("multi", 2), ("merge", 2)])
def test_report_of_one_suite_has_its_pictures(tmp_path, suite, expected):
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    pictures = report.write(write_lines(tmp_path, *suites()[suite], suite=suite))[1:]
    assert len(pictures) == expected


def test_report_has_no_pictures_without_timings(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    lines = [not_timed(None, "crashed", "signal SIGSEGV"), not_timed("peft", "absent", "-")]
    assert report.write(write_lines(tmp_path, *lines)) == [tmp_path / "report.md"]
    without_base = [line("fastlora", ratio=None, limit=None, ceilings=None)]
    names = [path.name for path in report.write(write_lines(tmp_path, *without_base))]
    assert names == ["report.md", "roofline.png"]


def test_every_provider_has_a_unique_fixed_style():
    known = plot_style.sort_providers([*comparison.PATHS, *plot_style._KNOWN])
    looks = {(plot_style.choose_style(n).colour, plot_style.choose_style(n).marker) for n in known}
    assert len(looks) == len(known)
    assert known[0] == "fastlora"
    assert plot_style.choose_style("whoever") == plot_style.choose_style("whoever")
    assert plot_style.sort_providers(["whoever", "torch", "fastlora"]) == [
        "fastlora",
        "torch",
        "whoever",
    ]
