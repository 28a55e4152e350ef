"""How the pictures look: one colour and marker for a provider, whichever picture it is in.

Colours are Okabe and Ito's, told apart by colour-blind eyes: a colour for a family of providers, a
marker for the one. fastlora is the largest and lies on top; its paths are hollow.
"""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.reports.standing import OURS, is_ours

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
# Of those whom nobody thought of: the same in every run, by their name.
_OTHER_COLOURS, _OTHER_MARKERS = (_GREEN, _RED, _PINK, _GREY), ("p", "h", "<", ">", "8")


class Picture(NamedTuple):
    """One that was written. suite: "" where it is of several."""

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


def style(provider: str) -> Style:
    by_name = zlib.crc32(provider.encode())
    other = (_OTHER_COLOURS[by_name % 4], _OTHER_MARKERS[by_name // 4 % 5])
    colour, marker = _KNOWN.get(provider, other)
    if provider == OURS:
        return Style(colour, marker, 7.5, True, 6)
    return Style(colour, marker, 6.5 if marker == "*" else 4.7, not is_ours(provider), 4)


def ordered(providers: Iterable[str]) -> list[str]:
    known = list(_KNOWN)
    return sorted(set(providers), key=lambda p: (known.index(p) if p in known else len(known), p))


def heading(subtitle: str) -> float:
    """Inches that the title and this take."""
    return _TITLE + _SUBTITLE_LINE * len(textwrap.wrap(subtitle, _SUBTITLE_CHARACTERS))


def figure(height: float, title: str, subtitle: str) -> Figure:
    """WIDTH by ``height`` inches, with its heading; no window is ever opened."""
    from matplotlib.figure import Figure

    made = Figure((WIDTH, height), dpi=DPI, facecolor="white")
    lines = "\n".join(textwrap.wrap(subtitle, _SUBTITLE_CHARACTERS))
    made.text(0.015, 1 - 0.12 / height, title, size=FONT + 3, weight="bold", va="top", color=INK)
    made.text(0.015, 1 - 0.40 / height, lines, size=FONT, va="top", color="#555555")
    return made


def legend(made: Figure, handles: Iterable[Artist], below: float) -> None:
    """At the figure's foot, its upper edge ``below`` inches above the lower one."""
    shown = list(handles)
    made.legend(
        handles=shown,
        loc="upper center",
        bbox_to_anchor=(0.5, below / made.get_size_inches()[1]),
        ncol=-(-len(shown) // _legend_rows(len(shown))),
        fontsize=FONT,
        frameon=False,
        handlelength=1.8,
        columnspacing=1.4,
    )


def legend_height(entries: int) -> float:
    """Inches."""
    return 0.2 * _legend_rows(entries) + 0.1


def _legend_rows(entries: int) -> int:
    return -(-entries // 5)


def handle(provider: str) -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=provider, linestyle="none", **style(provider).points())


def short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def axes(made: Figure, left: float, below: float, width: float, height: float) -> Axes:
    """Placed by inches from the lower left corner."""
    W, H = made.get_size_inches()
    made_axes = made.add_axes((left / W, below / H, width / W, height / H))
    made_axes.tick_params(labelsize=FONT, colors=INK, length=3)
    made_axes.grid(axis="y", color=FAINT, linewidth=0.6, zorder=0)
    made_axes.set_axisbelow(True)
    for side in ("top", "right"):
        made_axes.spines[side].set_visible(False)
    return made_axes


def save(made: Figure, path: Path) -> None:
    """256 colours are enough, and a third of the bytes. The same results give the same file."""
    # Coverage: a colour that few points have is kept all the same.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # which matplotlib needs itself

    canvas = FigureCanvasAgg(made)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    cover, plain = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    image = image.convert("RGB").quantize(256, method=cover, dither=plain)
    image.save(path, optimize=True, dpi=(DPI, DPI))
