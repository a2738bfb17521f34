"""The report's one figure: the paper's Fig. 3, the change of exposed parts in percent."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

from erase_sd.common.errors import UserError
from erase_sd.common.plotting import FORGET, INK, QUIET, REDIRECT, RETAIN, tidy
from eval.judges.protocols import change
from eval.reporting.blocks import Picture
from eval.reporting.inputs import ImageSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (RETAIN, FORGET, REDIRECT, "#66a182", "#7d5ba6", "#8c6d46")
PROTOCOL = "scissorhands"  # of Fig. 3


class Panel(NamedTuple):
    """One panel of Fig. 3: exposed parts, counted alike on the same prompts."""

    unit: str
    before: dict[str, int]  # part -> n_SD, the total last
    after: dict[str, dict[str, int]]  # model -> part -> n
    change: dict[str, dict[str, float | None]]  # percent; None, undefined, where n_SD = 0


def panel(baseline: ImageSet, models: list[ImageSet]) -> Panel:
    """Return the numbers of a panel. Raises UserError where counts cannot be compared."""
    rule = _rule(baseline)
    unit = rule["unit"]
    after: dict[str, dict[str, int]] = {}
    changes: dict[str, dict[str, float | None]] = {}
    for model in models:
        _check_alike(baseline, model)
        after[model.label] = _counts(_rule(model), unit)
        changes[model.label] = change(_rule(model), rule, unit)
    return Panel(unit, _counts(rule, unit), after, changes)


def _rule(judged: ImageSet) -> dict:
    return judged.nudity["protocols"][PROTOCOL]


def _counts(rule: dict, unit: str) -> dict[str, int]:
    """Return {part: count}, the total last."""
    counts = {part: count[unit] for part, count in rule["counts"].items()}
    return counts | {"total": rule["total"][unit]}


def _check_alike(baseline: ImageSet, judged: ImageSet) -> None:
    """Raise UserError where detectors, numbers of images or prompts differ."""
    paths = f"{judged.folder.path} and {baseline.folder.path}"
    if judged.nudity["detector"] != baseline.nudity["detector"]:
        raise UserError(f"{paths} were judged by different detectors: run eval.nudity on both with the same")
    if judged.nudity["n"] != baseline.nudity["n"]:
        raise UserError(f"{paths} hold different numbers of images: generate what is missing, then eval.nudity")
    if judged.folder.generation.get("prompts_sha256") != baseline.folder.generation.get("prompts_sha256"):
        raise UserError(f"{paths} were drawn from different prompts: a change needs the same ones")


def part_name(part: str) -> str:
    """Return a part as a reader calls it: FEMALE_BREAST_EXPOSED is Female breast."""
    return part.removesuffix("_EXPOSED").replace("_", " ").capitalize()


def percent(value: float | None) -> str:
    """Return a change as it is written: with its sign, and undefined where nothing was there before."""
    if value is None:
        return "undefined"
    if value == 0:
        return "0 %"
    return f"{value:+.1f} %".replace("-", "\N{MINUS SIGN}")


def fig3(name: str, title: str, numbers: Panel) -> Picture:
    """Return bars of the change in percent, one for every part and model; n_SD stands beside the part's name."""
    from matplotlib.figure import Figure

    parts, models = list(numbers.before), list(numbers.change)
    figure = Figure(figsize=(9, 1.3 + len(parts) * (0.2 + 0.21 * len(models))), layout="constrained")
    axes = figure.subplots()
    for index, model in enumerate(models):
        _bars(axes, [numbers.change[model][part] for part in parts], index, len(models))
    axes.set_yticks(range(len(parts)), [f"{part_name(part)} ({numbers.before[part]})" for part in parts])
    axes.set_ylim(len(parts) - 0.45, -0.55)
    low, top = -100, 0
    for changes in numbers.change.values():
        for value in changes.values():
            if value is not None:
                low, top = min(low, value), max(top, value)
    axes.set_xlim(low - 0.13 * (top - low), top + 0.14 * (top - low))
    axes.axvline(0, color=QUIET, linewidth=0.8, zorder=0)
    axes.set_xlabel(f"change of the number of {numbers.unit}, %; in brackets the original model's number")
    tidy(axes, title)
    _legend(figure, models)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    totals = ", ".join(f"{model} {percent(changes['total'])}" for model, changes in numbers.change.items())
    return Picture(f"{name}.png", data.getvalue(), f"{title}: in total {totals}", wide=True)


def _bars(axes: Axes, values: list[float | None], index: int, models: int) -> None:
    """Plot one model's bars, each with its value; None is no bar and the word "undefined"."""
    high = 0.8 / models
    for row, value in enumerate(values):
        place = row - 0.4 + high * (index + 0.5)
        axes.barh(place, value or 0, height=0.86 * high, color=COLOURS[index % len(COLOURS)])
        left = value is not None and value < 0
        axes.annotate(
            percent(value),
            (value or 0, place),
            (-4 if left else 4, 0),
            textcoords="offset points",
            color=INK,
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            style="italic" if value is None else "normal",
        )


def _legend(figure: Figure, models: list[str]) -> None:
    from matplotlib.patches import Patch

    handles, names = [], []
    for index, model in enumerate(models):
        handles.append(Patch(color=COLOURS[index % len(COLOURS)]))
        names.append(f" {model}")  # matplotlib drops labels that begin with an underscore
    legend = figure.legend(handles, names, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder may be called a$b$c
