"""The house style of plots: colours, axes, and PNG files that are the same on every machine."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erase_sd.common.files import write_atomic

INK, RETAIN, FORGET, REDIRECT, QUIET = "#30343f", "#2a7f9e", "#d1495b", "#edae49", "#b8bcc6"


def tidy(axes: Axes, title: str) -> None:
    """A title on the left, no box, small numbers: how all our plots look."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def write_png(path: Path, figure: Figure) -> None:
    """Write a figure in one piece; parent folders are made."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomic(path, picture.getvalue())
