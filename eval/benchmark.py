"""Every method side by side on the embedded model: `python -m eval.benchmark --suite pocket`.

Methods x concepts x seeds, evaluated by the oracle; below --output_dir: leaderboard.csv, .md and .png, grid.png, and
what they were made of: rows/ and distances.json. A killed benchmark goes on where it was; rows that are finished are
never run again, rows of another configuration ("stale") are.

--publish puts all of it into --results_dir as <suite>.jsonl (one row a line), .csv, .md, .png, -grid.png and
-distances.json, small enough to be committed. Rows that are published there count as finished.

    pocket            held-out concepts that no setting was chosen on, three seeds: hours
    pocket-quick      one of them, one seed: minutes
    pocket-tuning     the concepts that settings are chosen on
    pocket-ablation   our default on these, one option changed at a time
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from erase_sd.common.cli import at_least, command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import RunLock, replace_between, text_around, write_atomic
from erase_sd.common.processes import workers
from eval.benchmarking.aggregate import method_scores
from eval.benchmarking.plots import grid, leaderboard
from eval.benchmarking.rows import (
    BenchmarkRow,
    Finished,
    Published,
    RowResult,
    distances_file,
    read_published,
    rows,
    rows_file,
    stored,
    write_published,
)
from eval.benchmarking.suites import ORIGINAL, SUITES
from eval.benchmarking.tables import (
    before_after_table,
    leaderboard_csv,
    leaderboard_page,
    leaderboard_summary,
)
from eval.benchmarking.trial import finish


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
    results_dir: str | None = knob(
        "docs/results", "folder of published results, which count as finished; none measures everything again"
    )
    publish: bool = knob(False, "write the finished rows, the tables and the plots into --results_dir as well")
    readme: str | None = knob(
        None,
        "file in which the tables replace what is between <!-- leaderboard:start -->, <!-- results:start --> and end",
    )
    keep: bool = knob(False, "keep the erased UNets in <output_dir>/.cache/runs, 20 MB each")

    def __post_init__(self) -> None:
        """Raise UserError for numbers out of range, an unknown suite and nowhere to publish to."""
        at_least(self, 1, "processes")
        if self.seeds and min(self.seeds) < 0:
            raise UserError(f"--seeds {min(self.seeds)} is below 0")
        if self.suite not in SUITES:
            raise UserError(f"--suite {self.suite} is none of {', '.join(SUITES)}")
        if self.publish and self.results_dir is None:
            raise UserError("--publish needs a folder: give --results_dir, such as docs/results")


def compare(options: Benchmark) -> int:
    """Run what is missing, write the tables after every seed; return 1 where rows failed."""
    if options.readme:
        for mark in ("leaderboard", "results"):
            text_around(Path(options.readme), mark)  # refuses now what would be refused after hours
    suite = SUITES[options.suite]
    wanted = rows(suite, options.methods, options.concepts, options.seeds)
    by_file = {}
    for row in [*rows(suite, (), (), ()), *wanted]:
        by_file[row.file] = row
    everything = list(by_file.values())
    published = read_published(options.results_dir, options.suite)
    folder = Path(options.output_dir or f"runs/benchmark-{options.suite}")
    failed: list[str] = []
    with RunLock(folder):
        if options.run:
            failed = run(options, wanted, everything, folder, published)
        print(report(options, everything, folder, published))
    for text in failed:
        print(f"error: {text}", file=sys.stderr)
    return int(bool(failed))


def run(
    options: Benchmark,
    wanted: list[BenchmarkRow],
    everything: list[BenchmarkRow],
    folder: Path,
    published: Published,
) -> list[str]:
    """Carry out the rows that are missing or stale, seed by seed; return what went wrong with the others."""
    missing, stale = [], []
    for row in wanted:
        if stored(row, folder, published.rows) is None:
            missing.append(row)
            if (folder / "rows" / row.file).is_file() or row.file in published.rows:
                stale.append(row.file)
    print(f"{folder}: {len(wanted) - len(missing)} of {len(wanted)} rows are finished", file=sys.stderr)
    if stale:
        print(f"{len(stale)} rows are stale and run again: {' '.join(stale)}", file=sys.stderr)
    failed: list[str] = []
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc=options.suite, unit="row")
    with bar, workers(options.processes) as pool:
        for seed in dict.fromkeys(row.seed for row in missing):
            originals, others = [], []
            for row in missing:
                if row.seed == seed:
                    group = originals if row.method == ORIGINAL else others
                    group.append(row)
            failed += finish_all(originals, folder, options.keep, pool, bar)  # the others compare with its samples
            failed += finish_all(others, folder, options.keep, pool, bar)
            write_tables(options.suite, everything, folder, published)
    return failed


def finish_all(rows: list[BenchmarkRow], folder: Path, keep: bool, pool: Executor, bar: tqdm) -> list[str]:
    """Finish these rows; return the sentences of those that failed, which do not stop the others."""
    failed = []
    for future in as_completed([pool.submit(finish, row, folder, keep) for row in rows]):
        try:
            bar.set_postfix_str(future.result())
        except UserError as error:
            failed.append(str(error))
        bar.update()
    return failed


def report(options: Benchmark, everything: Sequence[BenchmarkRow], folder: Path, published: Published) -> str:
    """Write the tables and plots, publish them if asked to; return the Markdown page.

    Raises UserError for a README without the marks, and where there is nothing to publish.
    """
    page, finished, whole = write_tables(options.suite, everything, folder, published, options.readme)
    if options.publish:
        if not finished:
            raise UserError(f"--publish: no row of {options.suite} is finished in {folder}, run it first")
        publish(options.suite, finished, folder, Path(options.results_dir), whole)
    return page


def write_tables(
    name: str, everything: Sequence[BenchmarkRow], folder: Path, published: Published, readme: str | None = None
) -> tuple[str, Finished, bool]:
    """Write the tables, the plot and the grid of the rows that are finished.

    Return the Markdown page, the finished rows with their results, and whether the grid shows all their methods.
    """
    finished: list[tuple[BenchmarkRow, RowResult]] = []
    left: list[BenchmarkRow] = []
    for row in everything:
        result = stored(row, folder, published.rows)
        if result:
            finished.append((row, result))
        else:
            left.append(row)
    if not finished:
        return f"{folder}: no row is finished yet.", finished, False
    board = method_scores(finished, folder, published.distances)
    page = leaderboard_page(name, SUITES[name], board, left)
    write_atomic(folder / "leaderboard.csv", leaderboard_csv(board))
    write_atomic(folder / "leaderboard.md", page)
    leaderboard(board, folder / "leaderboard.png")
    whole = grid([row for row, _ in finished], folder)
    if readme:
        ours = next(iter(SUITES[name].methods))
        replace_between(Path(readme), "leaderboard", leaderboard_summary(board))
        replace_between(Path(readme), "results", before_after_table(finished, ours))
    return f"{page}\n{folder}/leaderboard.csv, .md, .png, grid.png", finished, whole


def publish(suite: str, finished: Finished, folder: Path, place: Path, whole: bool) -> None:
    """Write the rows' results into one file of the folder of results, and copy the tables, plots and distances there.

    A grid that lacks methods does not replace the published one.
    """
    write_published(place, suite, finished)
    copies = {"distances.json": distances_file(place, suite)}
    for end in ("csv", "md", "png"):
        copies[f"leaderboard.{end}"] = place / f"{suite}.{end}"
    if whole:
        copies["grid.png"] = place / f"{suite}-grid.png"
    for name, file in copies.items():
        write_atomic(file, (folder / name).read_bytes())
    print(f"{len(finished)} rows are in {rows_file(place, suite)}", file=sys.stderr)


main = command("eval.benchmark", "Compare erasing methods on the pocket model.", Benchmark, compare)

if __name__ == "__main__":
    run_main(main)
