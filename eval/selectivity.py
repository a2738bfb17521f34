"""What a saliency selects, before any repair: `python -m eval.selectivity --concepts cat "neon style"`, minutes.

For every saliency, concept and seed, the top k of the pocket model's default are taken and re-initialised:

    others     share of the selected entries that it also selects for another of the concepts, mean over those
    retained   share that SNIP on the retain data, |theta g_r|, selects at the same k: what everything shares
    L_f, L_r   forget and retain loss after the trim, in units of those before it
    gap        (L_a - L_f) / L_f after the trim: how much better than the anchor's words the concept's still explain it
    cos        of g_r to g_f, and of g_r to g_f - g_a, after the trim: where it is above 0, the projection on it takes
               its square out of |g_r|^2, which is repair

g_a and L_a belong to the forget set's noisy latents under the anchor's caption. Pictures are drawn once, into .cache.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from erase_sd.knobs import at_least
from erase_sd.options import knob, parse
from erase_sd.process import UserError, run_main
from erase_sd.runtime import write_atomic
from erase_sd.terminal import quiet

if TYPE_CHECKING:
    from eval.cuts import Cut

COLUMNS = {  # of a Cut: head in the table, factor, digits
    "others": ("others, %", 100, 1),
    "retained": ("retained, %", 100, 1),
    "forget": ("L_f, x", 1, 2),
    "retain": ("L_r, x", 1, 2),
    "gap": ("gap, %", 100, 1),
    "cos_forget": ("cos g_r, g_f", 1, 2),
    "cos_contrast": ("cos g_r, g_f - g_a", 1, 2),
}


@dataclass(frozen=True, kw_only=True)
class Selectivity:
    """What to select for."""

    concepts: tuple[str, ...] = knob(
        ("cat", "neon style", "blue background"), "two or more concepts of the pocket model"
    )
    saliencies: tuple[str, ...] = knob(
        ("abs", "contrast", "gradient", "magnitude", "random"), "of --method scissorhands"
    )
    scopes: tuple[str, ...] = knob(("attn", "full"), "parameters that are ranked and trimmed: groups of --trim_scope")
    seeds: tuple[int, ...] = knob((0, 1, 2), "of pictures, batches and new values")
    batches: int = knob(8, "batches over which losses and cosines after the trim are averaged")
    output_dir: str = knob("runs/selectivity", "folder of selectivity.csv and .md, and of the pictures' .cache")

    def __post_init__(self) -> None:
        """Raise UserError for numbers out of range, and for a comparison of one concept."""
        at_least(self, 1, "batches")
        if len(set(self.concepts)) < 2 or not (self.saliencies and self.scopes and self.seeds):
            raise UserError(
                f"--concepts {' '.join(self.concepts)} leaves nothing to compare: give two or more concepts"
            )


def main(argv: list[str] | None = None) -> int:
    """Measure, write and print the table."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Measure what saliencies select on the pocket model."
    options = Selectivity(
        **parse(argv, prog="eval.selectivity", description=text, selectivity=Selectivity)["selectivity"]
    )
    quiet()
    from eval.cuts import cuts

    found = cuts(
        options.concepts, options.saliencies, options.scopes, options.seeds, options.batches, options.output_dir
    )
    folder = Path(options.output_dir)
    write_atomic(folder / "selectivity.csv", as_csv(found))
    write_atomic(folder / "selectivity.md", page := markdown(found, options))
    print(f"{page}\n{folder}: selectivity.csv, .md")
    return 0


def as_csv(found: list[Cut]) -> str:
    """A line per scope, saliency, concept and seed; shares in [0, 1]."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(found[0]._fields)
    writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in cut] for cut in found)
    return out.getvalue()


def markdown(found: list[Cut], options: Selectivity) -> str:
    """Mean and standard deviation over concepts and seeds, a line per scope and saliency."""
    heads = ["scope", "saliency", "k", *(head for head, *_ in COLUMNS.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for scope, saliency in dict.fromkeys((cut.scope, cut.saliency) for cut in found):
        group = [cut for cut in found if (cut.scope, cut.saliency) == (scope, saliency)]
        cells = [_cell([getattr(cut, key) for cut in group], *how) for key, (_, *how) in COLUMNS.items()]
        lines.append(f"| {' | '.join([scope, saliency, f'{group[0].k:,}', *cells])} |")
    runs = (
        f"{len(options.concepts)} concepts ({', '.join(options.concepts)}), seeds {', '.join(map(str, options.seeds))}"
    )
    text = f"Mean ± standard deviation over {runs}; the terms are explained in `eval/selectivity.py`."
    return f"# What each saliency selects on the pocket model\n\n{text}\n\n" + "\n".join(lines) + "\n"


def _cell(values: list[float], factor: float, digits: int) -> str:
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    run_main(main)
