"""The house style of plots: colours, axes, and PNG files that are the same on every machine."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from erase_sd.common.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RETAIN, FORGET, REDIRECT, QUIET = "#30343f", "#2a7f9e", "#d1495b", "#edae49", "#b8bcc6"


def tidy(axes: Axes, title: str) -> None:
    """Give the axes a title on the left, no box and small numbers: how all our plots look."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def write_png(path: Path, figure: Figure) -> None:
    """Write a figure in one piece; parent folders are made."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomic(path, picture.getvalue())
