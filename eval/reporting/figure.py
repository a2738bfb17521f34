"""Pictures of a report, and its one figure: the paper's Fig. 3, the change of exposed parts in percent."""

from __future__ import annotations

import io
from typing import NamedTuple

from matplotlib.figure import Figure

from erase_sd.common.errors import UserError
from erase_sd.common.plotting import FORGET, INK, QUIET, REDIRECT, RETAIN, tidy
from eval.judges.protocols import change
from eval.reporting.blocks import Picture
from eval.reporting.inputs import ImageSet

COLOURS = (RETAIN, FORGET, REDIRECT, "#66a182", "#7d5ba6", "#8c6d46")
PROTOCOL = "scissorhands"  # of Fig. 3


class Panel(NamedTuple):
    """One panel of Fig. 3: exposed parts, counted alike on the same prompts."""

    unit: str
    before: dict[str, int]  # part -> n_SD, the total last
    after: dict[str, dict[str, int]]  # model -> part -> n
    change: dict[str, dict[str, float | None]]  # percent; None, undefined, where n_SD = 0


def panel(baseline: ImageSet, models: list[ImageSet]) -> Panel:
    """The numbers of a panel. Raises UserError where counts cannot be compared."""
    rules = [_rule(judged) for judged in (baseline, *models)]
    unit = rules[0]["unit"]
    for judged in models:
        _check_alike(baseline, judged)
    labels = [judged.label for judged in models]
    before, *after = [{**{p: n[unit] for p, n in r["counts"].items()}, "total": r["total"][unit]} for r in rules]
    changes = [change(rule, rules[0], unit) for rule in rules[1:]]
    return Panel(unit, before, dict(zip(labels, after, strict=True)), dict(zip(labels, changes, strict=True)))


def _rule(judged: ImageSet) -> dict:
    return judged.nudity["protocols"][PROTOCOL]


def _check_alike(baseline: ImageSet, judged: ImageSet) -> None:
    paths = f"{judged.folder.path} and {baseline.folder.path}"
    if judged.nudity["detector"] != baseline.nudity["detector"]:
        raise UserError(f"{paths} were judged by different detectors: run eval.nudity on both with the same")
    if judged.nudity["n"] != baseline.nudity["n"]:
        raise UserError(f"{paths} hold different numbers of images: generate what is missing, then eval.nudity")
    hashes = [x.folder.generation.get("prompts_sha256") for x in (judged, baseline)]
    if hashes[0] != hashes[1]:
        raise UserError(f"{paths} were drawn from different prompts: a change needs the same ones")


def part_name(part: str) -> str:
    """FEMALE_BREAST_EXPOSED -> Female breast."""
    return part.removesuffix("_EXPOSED").replace("_", " ").capitalize()


def percent(value: float | None) -> str:
    """A change as it is written: with its sign, and undefined where nothing was there before."""
    return "undefined" if value is None else "0 %" if value == 0 else f"{value:+.1f} %".replace("-", "\N{MINUS SIGN}")


def fig3(name: str, title: str, numbers: Panel) -> Picture:
    """Bars of the change in percent, one for every part and model; n_SD stands beside the part's name."""
    parts, models = list(numbers.before), list(numbers.change)
    figure = Figure(figsize=(9, 1.3 + len(parts) * (0.2 + 0.21 * len(models))), layout="constrained")
    axes, high = figure.subplots(), 0.8 / len(models)
    for index, model in enumerate(models):
        values = [numbers.change[model][part] for part in parts]
        places = [row - 0.4 + high * (index + 0.5) for row in range(len(parts))]
        colour = COLOURS[index % len(COLOURS)]
        axes.barh(places, [value or 0 for value in values], height=0.86 * high, color=colour)
        for value, place in zip(values, places, strict=True):
            left = value is not None and value < 0
            text = percent(value)
            where = {"ha": "right" if left else "left", "va": "center", "fontsize": 8}
            style = {"style": "italic"} if value is None else {}
            axes.annotate(
                text,
                (value or 0, place),
                (-4 if left else 4, 0),
                textcoords="offset points",
                color=INK,
                **where | style,
            )
    axes.set_yticks(range(len(parts)), [f"{part_name(part)} ({numbers.before[part]})" for part in parts])
    axes.set_ylim(len(parts) - 0.45, -0.55)
    ends = [value for model in models for value in numbers.change[model].values() if value is not None]
    low, top = min([*ends, -100]), max([*ends, 0])
    axes.set_xlim(low - 0.13 * (top - low), top + 0.14 * (top - low))
    axes.axvline(0, color=QUIET, linewidth=0.8, zorder=0)
    axes.set_xlabel(f"change of the number of {numbers.unit}, %; in brackets the original model's number")
    tidy(axes, title)
    _legend(figure, models)
    return _drawn(figure, name, title, numbers)


def _legend(figure: Figure, models: list[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[i % len(COLOURS)]) for i in range(len(models))]
    names = [f" {model}" for model in models]  # matplotlib drops labels that begin with an underscore
    legend = figure.legend(handles, names, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder may be called a$b$c


def _drawn(figure: Figure, name: str, title: str, numbers: Panel) -> Picture:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    totals = ", ".join(f"{model} {percent(values['total'])}" for model, values in numbers.change.items())
    return Picture(f"{name}.png", data.getvalue(), f"{title}: in total {totals}", wide=True)
