"""How the pictures look: one colour and marker for a provider, whichever picture it is in.

Colours are Okabe and Ito's, told apart by colour-blind eyes: a colour for a family of providers, a
marker for the one. fastlora is the largest and lies on top; its paths are hollow.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.standing import OURS, is_ours

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
FONT = 9
# Inches: of every picture, of its heading, of a line of the smaller text.
WIDTH, HEADING, LINE = 10.0, 0.62, 0.135
INK, FAINT = "#222222", "#cccccc"

_BLUE, _SKY, _GREEN, _ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00"
_RED, _PINK, _BLACK, _GREY = "#D55E00", "#CC79A7", "#000000", "#777777"

# In the order of the legends.
_KNOWN = {
    OURS: (_BLUE, "o"),
    "fastlora-pages": (_BLUE, "s"),
    "fastlora-invariant": (_BLUE, "D"),
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
    "torch": (_BLACK, "s"),
    "torch-gather": (_BLACK, "v"),
    "torch-split": (_BLACK, "^"),
    "merged": (_GREY, "d"),
    "peft": (_ORANGE, "D"),
    "peft-compiled": (_ORANGE, "s"),
    "unsloth": (_RED, "^"),
    "liger": (_RED, "v"),
    "vllm": (_PINK, "X"),
    "sglang": (_PINK, "P"),
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
    hollow = provider.startswith(OURS) or is_ours(provider)
    return Style(colour, marker, 7.0 if marker == "*" else 5.0, not hollow, 4)


def ordered(providers: Iterable[str]) -> list[str]:
    known = list(_KNOWN)
    return sorted(set(providers), key=lambda p: (known.index(p) if p in known else len(known), p))


def figure(height: float, title: str, subtitle: str) -> Figure:
    """WIDTH by ``height`` inches with a heading; no window is ever opened."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure((WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(made)
    made.text(0.015, 1 - 0.12 / height, title, size=FONT + 3, weight="bold", va="top", color=INK)
    made.text(0.015, 1 - 0.40 / height, subtitle, size=FONT, va="top", color="#555555")
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
    return -(-entries // 7)


def handle(provider: str) -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=provider, linestyle="none", **style(provider).points())


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
    # Without a version in it the same results give the same file.
    made.savefig(path, metadata={"Software": None})
