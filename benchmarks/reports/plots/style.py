"""Style of the pictures: one colour and marker for a provider in all of them.

Colours are Okabe and Ito's, told apart by colour-blind eyes: a colour for a family of providers, a
marker for the one. fastlora is the largest and lies on top; its paths are hollow.
"""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.reports.comparison import OURS, is_ours

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
FONT = 9
# Inches: of every picture, and of a line of the smaller text.
WIDTH, LINE = 10.0, 0.135
_TITLE, _SUBTITLE_LINE, _SUBTITLE_CHARACTERS = 0.45, 0.17, 135
INK, FAINT = "#222222", "#cccccc"

_BLUE, _SKY, _GREEN, _ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
_RED, _PINK, _BLACK, _GREY = "#D55E00", "#CC79A7", "#000000", "#777777"

# In the order of the legends.
_KNOWN = {
    OURS: (_BLUE, "o"),
    "fastlora-pages": (_BLUE, "s"),
    "fastlora-invariant": (_BLUE, "D"),
    "fastlora-compiled": (_BLUE, "^"),
    "fastlora-functional": (_BLUE, "v"),
    "peft-patched": (_BLUE, "p"),
    "one_pass": (_SKY, "^"),
    "two_pass": (_SKY, "v"),
    "overlapped": (_SKY, ">"),
    "decode": (_SKY, "<"),
    "decode_beside": (_SKY, "P"),
    "prefill": (_SKY, "X"),
    "prefill_beside": (_SKY, "d"),
    "library": (_SKY, "h"),
    "triton": (_SKY, "p"),
    "cuda": (_GREEN, "*"),
    "native": (_SKY, "o"),
    "torch-product": (_SKY, "s"),
    "torch": (_BLACK, "s"),
    "torch-compiled": (_BLACK, "D"),
    "torch-gather": (_BLACK, "v"),
    "torch-split": (_BLACK, "^"),
    "peft": (_ORANGE, "D"),
    "peft-compiled": (_ORANGE, "s"),
    "peft-unmerged": (_ORANGE, "^"),
    "peft-prefix": (_ORANGE, "<"),
    "peft-prompt": (_ORANGE, ">"),
    "unsloth": (_RED, "^"),
    "liger": (_RED, "v"),
    "peft-liger": (_RED, "D"),
    "vllm": (_PINK, "X"),
    "sglang": (_PINK, "P"),
    "merged": (_GREY, "d"),
    "peft-merged": (_GREY, "h"),
    "base-compiled": (_GREY, "s"),
    "base": (_GREY, "o"),
}
# For providers not listed above: chosen by their name, the same in every run.
_OTHER_COLOURS, _OTHER_MARKERS = (_GREEN, _RED, _PINK, _GREY), ("p", "h", "<", ">", "8")


class Picture(NamedTuple):
    """Picture that was written. suite: "" where it shows several."""

    suite: str
    path: Path
    caption: str


class Style(NamedTuple):
    colour: str
    marker: str
    size: float
    filled: bool
    above: int  # z-order

    def points(self) -> dict[str, Any]:
        """matplotlib's arguments for this provider's points."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": self.size,
            "markerfacecolor": self.colour if self.filled else "white",
            "markeredgecolor": self.colour,
            "markeredgewidth": 1.0,
            "zorder": self.above,
        }


def choose_style(provider: str) -> Style:
    by_name = zlib.crc32(provider.encode())
    other = (_OTHER_COLOURS[by_name % 4], _OTHER_MARKERS[by_name // 4 % 5])
    colour, marker = _KNOWN.get(provider, other)
    if provider == OURS:
        return Style(colour, marker, 7.5, True, 6)
    return Style(colour, marker, 6.5 if marker == "*" else 4.7, not is_ours(provider), 4)


def sort_providers(providers: Iterable[str]) -> list[str]:
    known = list(_KNOWN)
    return sorted(set(providers), key=lambda p: (known.index(p) if p in known else len(known), p))


def measure_heading(subtitle: str) -> float:
    """Returns the inches that the title and this take."""
    return _TITLE + _SUBTITLE_LINE * len(textwrap.wrap(subtitle, _SUBTITLE_CHARACTERS))


def make_figure(height: float, title: str, subtitle: str) -> Figure:
    """Makes a figure of WIDTH by ``height`` inches with its heading; opens no window."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), dpi=DPI, facecolor="white")
    lines = "\n".join(textwrap.wrap(subtitle, _SUBTITLE_CHARACTERS))
    figure.text(0.015, 1 - 0.12 / height, title, size=FONT + 3, weight="bold", va="top", color=INK)
    figure.text(0.015, 1 - 0.40 / height, lines, size=FONT, va="top", color="#555555")
    return figure


def add_legend(figure: Figure, handles: Iterable[Artist], below: float) -> None:
    """Adds a legend at the figure's foot, its top ``below`` inches above the lower edge."""
    shown = list(handles)
    figure.legend(
        handles=shown,
        loc="upper center",
        bbox_to_anchor=(0.5, below / figure.get_size_inches()[1]),
        ncol=-(-len(shown) // _legend_rows(len(shown))),
        fontsize=FONT,
        frameon=False,
        handlelength=1.8,
        columnspacing=1.4,
    )


def measure_legend(entries: int) -> float:
    """Returns the inches that a legend of so many entries takes."""
    return 0.2 * _legend_rows(entries) + 0.1


def _legend_rows(entries: int) -> int:
    return -(-entries // 5)


def make_handle(provider: str) -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=provider, linestyle="none", **choose_style(provider).points())


def format_short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def add_axes(figure: Figure, left: float, below: float, width: float, height: float) -> Axes:
    """Adds axes, placed by inches from the lower left corner."""
    W, H = figure.get_size_inches()
    axes = figure.add_axes((left / W, below / H, width / W, height / H))
    axes.tick_params(labelsize=FONT, colors=INK, length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def save(figure: Figure, path: Path) -> None:
    """Saves a PNG of 256 colours, a third of the bytes; the same results give the same file."""
    # Coverage: a colour that few points have is kept all the same.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # which matplotlib needs itself

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    cover, plain = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    image = image.convert("RGB").quantize(256, method=cover, dither=plain)
    image.save(path, optimize=True, dpi=(DPI, DPI))
