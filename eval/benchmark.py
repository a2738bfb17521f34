"""Every method side by side on the pocket model: `python -m eval.benchmark --suite pocket`.

Methods x concepts x seeds, judged by the oracle; below --output_dir: leaderboard.csv, .md and .png, grid.png, and
what they were made of: rows/ and distances.json, small enough to be committed. A killed benchmark goes on where it
was; rows that are finished are never run again, rows of another configuration ("stale") are.

    pocket            held-out concepts that no setting was chosen on, three seeds: hours
    pocket-quick      one of them, one seed: minutes
    pocket-tuning     the concepts that settings are chosen on
    pocket-ablation   our default on these, one knob changed at a time
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erase_sd.common.cli import at_least, knob, parse, quiet, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import RunLock, write_atomic
from eval.benchmarking.tables import around, replace_between

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from tqdm.auto import tqdm

    from eval.benchmarking.aggregate import Finished
    from eval.benchmarking.rows import BenchmarkRow


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to compare, and where the tables go."""

    suite: str = knob("pocket", "pocket, pocket-quick, pocket-tuning or pocket-ablation")
    methods: tuple[str, ...] = knob(
        (), "run only these, as the tables call them (default: all; tables always show all)"
    )
    concepts: tuple[str, ...] = knob((), "run only these, or others of the pocket model (default: the suite's)")
    seeds: tuple[int, ...] = knob((), "run only these (default: the suite's)")
    output_dir: str | None = knob(None, "folder of tables and rows (default: runs/benchmark-<suite>)")
    processes: int = knob(2, "rows at a time, one thread each")
    run: bool = knob(True, "run what is missing; --no-run writes the tables of what is there")
    readme: str | None = knob(
        None,
        "file in which the tables replace what is between <!-- leaderboard:start -->, <!-- results:start --> and end",
    )
    keep: bool = knob(False, "keep the erased UNets in <output_dir>/.cache/runs, 20 MB each")

    def __post_init__(self) -> None:
        """Raise UserError for numbers out of range."""
        at_least(self, 1, "processes")
        if self.seeds and min(self.seeds) < 0:
            raise UserError(f"--seeds {min(self.seeds)} is below 0")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, write the tables after every seed; returns 1 where rows failed."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Compare erasing methods on the pocket model."
    options = Benchmark(**parse(argv, prog="eval.benchmark", description=text, benchmark=Benchmark)["benchmark"])
    quiet()
    from eval.benchmarking.rows import rows
    from eval.benchmarking.suites import SUITES

    if options.suite not in SUITES:
        raise UserError(f"--suite {options.suite} is none of {', '.join(SUITES)}")
    if options.readme:
        for mark in ("leaderboard", "results"):
            around(Path(options.readme), mark)  # refuses now what would be refused after hours
    suite = SUITES[options.suite]
    wanted = rows(suite, options.methods, options.concepts, options.seeds)
    everything = list({row.file: row for row in [*rows(suite, (), (), ()), *wanted]}.values())
    folder = Path(options.output_dir or f"runs/benchmark-{options.suite}")
    with RunLock(folder):
        failed = run(options, wanted, everything, folder) if options.run else []
        print(report(options.suite, everything, folder, options.readme))
    for text in failed:
        print(f"error: {text}", file=sys.stderr)
    return int(bool(failed))


def run(options: Benchmark, wanted: list[BenchmarkRow], everything: list[BenchmarkRow], folder: Path) -> list[str]:
    """Carry out the rows that are missing or stale, seed by seed; returns what went wrong with the others."""
    from tqdm.auto import tqdm

    from erase_sd.common.processes import workers
    from eval.benchmarking.rows import stored
    from eval.benchmarking.suites import ORIGINAL

    missing = [row for row in wanted if stored(row, folder) is None]
    stale = [row.file for row in missing if (folder / "rows" / row.file).is_file()]
    print(f"{folder}: {len(wanted) - len(missing)} of {len(wanted)} rows are finished", file=sys.stderr)
    if stale:
        print(f"{len(stale)} rows are stale and run again: {' '.join(stale)}", file=sys.stderr)
    failed: list[str] = []
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=options.suite, unit="row")
    with bar, workers(options.processes) as pool:
        for seed in dict.fromkeys(row.seed for row in missing):
            mine = [row for row in missing if row.seed == seed]
            for first in (True, False):  # what the original model draws serves the others
                group = [row for row in mine if (row.method == ORIGINAL) is first]
                failed += carry_out(group, folder, options.keep, pool, bar)
            report(options.suite, everything, folder)
    return failed


def carry_out(rows: list[BenchmarkRow], folder: Path, keep: bool, pool: Executor, bar: tqdm) -> list[str]:
    """Finish these rows; returns the sentences of those that failed, which do not stop the others."""
    from concurrent.futures import as_completed

    from eval.benchmarking.trial import finish

    failed = []
    for future in as_completed([pool.submit(finish, row, folder, keep) for row in rows]):
        try:
            bar.set_postfix_str(future.result())
        except UserError as error:
            failed.append(str(error))
        bar.update()
    return failed


def report(name: str, rows: Sequence[BenchmarkRow], folder: Path, readme: str | None = None) -> str:
    """Write the tables, the figure and the grid of the rows that are finished; returns the Markdown page.

    Raises UserError for a README without the marks.
    """
    from eval.benchmarking import plots as leaderboard_plots
    from eval.benchmarking import tables as leaderboard
    from eval.benchmarking import tables as results
    from eval.benchmarking.aggregate import method_scores
    from eval.benchmarking.rows import stored
    from eval.benchmarking.suites import SUITES

    finished: Finished = [(row, result) for row in rows if (result := stored(row, folder))]
    if not finished:
        return f"{folder}: no row is finished yet."
    done = {row.file for row, _ in finished}
    board = method_scores(finished, folder)
    page = leaderboard.markdown(name, SUITES[name], board, [row for row in rows if row.file not in done])
    write_atomic(folder / "leaderboard.csv", leaderboard.as_csv(board))
    write_atomic(folder / "leaderboard.md", page)
    leaderboard_plots.tradeoff(board, folder / "leaderboard.png")
    leaderboard_plots.grid([row for row, _ in finished], folder)
    if readme:
        replace_between(Path(readme), "leaderboard", leaderboard.summary(board))
        replace_between(Path(readme), "results", results.results_table(finished, next(iter(SUITES[name].methods))))
    return f"{page}\n{folder}/leaderboard.csv, .md, .png, grid.png"


if __name__ == "__main__":
    run_main(main)
