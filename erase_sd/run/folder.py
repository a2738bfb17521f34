"""A run's folder: one configuration, one process, checkpoints while it works, results when it is done."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.files import RunLock, claim, remove_leftovers, write_atomic
from erase_sd.run.checkpoints import checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from erase_sd.run.record import write_run, write_status

# The tensors of a method's state: the optimiser's, what else it must not recompute, and sums before the first step.
PARTS = ("optimizer", "kept", "sums")
CONFIG = "job.json"  # not config.json, by which diffusers and our own loader tell the folder of a model
TRIED = {CONFIG, "status.json", "logs"}  # what a run leaves that failed before it had anything to keep


class Progress(NamedTuple):
    """Where a run stands: the method's state, the trace so far, entries re-initialised per parameter."""

    state: dict[str, Any] | None  # None before the first record
    trace: list[dict]
    changed: dict[str, int]

    def mapped(self, change: Callable[[Mapping], Mapping]) -> Progress:
        """Return the progress with `change` applied to each group of tensors in its state."""
        state = dict(self.state)
        for part in PARTS:
            state[part] = change(self.state.get(part, {}))
        return self._replace(state=state)

    def after(self, record: dict, state: dict[str, Any] | None) -> Progress:
        """Return the progress after one more record: nothing yet, the trim, or a step, whose NaN becomes None."""
        if state is None:
            return self
        if "changed" in record:
            return self._replace(state=state, changed=record["changed"])
        if "phase" in record:
            return self._replace(state=state)
        row = {}
        for key, value in record.items():
            undefined = isinstance(value, float) and math.isnan(value)
            row[key] = None if undefined else value
        return self._replace(state=state, trace=[*self.trace, row])


class RunFolder:
    """The folder of one run. Use it in a `with` block; UserError if another process, run or other files are there.

    Starting from nothing, or from an earlier checkpoint, loses nothing at once: what is there goes when the first new
    checkpoint is whole, and a complete run stays as it is.

    However the block ends, status.json tells the truth: a run that was running has stopped or failed, unless it is
    complete. Of several processes one `writes`; the others read the same folder, and what they write is left undone.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        writes: bool = True,
        limit: int | None = 1,
        start: str | None = "latest",
        free: frozenset[str] = frozenset(),
    ) -> None:
        self.path, self.config, self.writes = Path(path), json.loads(json.dumps(config)), writes
        self.limit = limit  # checkpoints that are kept, None for all
        self.start = start  # the one to go on from: "latest", a name or path, None for none
        self.free = free  # options of `config` that may change from one call to the next: they make no other run
        self._running = False

    def __enter__(self) -> RunFolder:
        if not self._failed_before_any_work():
            claim(self.path, CONFIG, self.config, self.free)
        if self.start not in ("latest", None) and not self.complete():
            _own(self.path / "checkpoints", self.start)  # now, not after hours of sampling
        self._stack = ExitStack()
        if self.writes:
            self._stack.enter_context(RunLock(self.path))
            remove_leftovers(self.path)
            write_atomic(self.path / CONFIG, json.dumps(self.config, indent=2) + "\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:  # the lock goes last
            if self._running:
                self._write_end(error)

    def _write_end(self, error: BaseException | None) -> None:
        """Write how the run ended; accelerate's launcher turns every exit code into 1, and this keeps the true one."""
        if isinstance(error, UserError):
            self.status("failed", 2, str(error))
        elif isinstance(error, SystemExit | KeyboardInterrupt):
            self.status("stopped", getattr(error, "code", 130), "run the same command again to go on")
        elif isinstance(error, Exception):
            self.status("failed", 1, f"{type(error).__name__}: {error}")

    def complete(self) -> dict | None:
        """Return the record of a run that is already done, else None."""
        status, run = self.path / "status.json", self.path / "run.json"
        if status.is_file() and run.is_file() and _read(status).get("state") == "complete":
            return _read(run)
        return None

    def _failed_before_any_work(self) -> bool:
        """Return whether all that is here is the failure of an earlier try, which nobody has to keep."""
        status = self.path / "status.json"
        if not status.is_file() or _read(status).get("state") != "failed":
            return False
        return all(path.name in TRIED or path.name.startswith(".") for path in self.path.iterdir())

    def status(self, state: str, code: int = 0, message: str = "") -> None:
        """Write how the run stands: running, complete, stopped or failed."""
        self._running = state == "running"
        if self.writes:
            write_status(self.path, state, code, message)

    def finish(self, record: dict) -> None:
        """Write the record and, after it, that the run is complete; its checkpoints are needed no longer."""
        if self.writes:
            write_run(self.path, record)
        self.status("complete")
        self.forget_checkpoints()

    def save(self, weights: dict[str, Tensor], progress: Progress) -> None:
        """Write a checkpoint; older ones go when this one is whole."""
        if not self.writes:
            return
        state = progress.state
        tensors: dict[str, Tensor] = {}
        for name, p in weights.items():
            tensors[f"weights/{name}"] = p.detach()
        for part in PARTS:
            for name, x in state.get(part, {}).items():
                tensors[f"{part}/{name}"] = x
        meta = {"trace": progress.trace, "changed": progress.changed} | _counts(state)
        kind, count = ("sensitivity", "measured") if "measured" in state else ("checkpoint", "step")
        save_checkpoint(self.path / "checkpoints", state[count], tensors, meta, self.limit, kind)

    def resume(self, weights: dict[str, Tensor], local: Callable[[Mapping], Mapping]) -> Progress | None:
        """Put the weights of the checkpoint to start from into `weights`; None if the run starts from nothing.

        `local` takes this process's part of the checkpoint's tensors. Raises UserError for a named checkpoint that is
        missing or damaged.
        """
        root = self.path / "checkpoints"
        if self.start is None:
            return None
        found = latest_checkpoint(root) if self.start == "latest" else _own(root, self.start)
        if found is None:
            return None
        tensors, meta = load_checkpoint(found)
        for name, x in local(tensors.below("weights/")).items():
            weights[name].data.copy_(x)
        state = _counts(meta)
        for part in PARTS:
            state[part] = local(tensors.below(f"{part}/"))
        return Progress(state, meta["trace"], meta["changed"])

    def forget_checkpoints(self) -> None:
        """Remove the checkpoints: the results have replaced them."""
        if self.writes:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


def _read(file: Path) -> dict:
    """Return the dict in a file of this run. Raises UserError for a damaged one."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: remove it, and the same command goes on") from error


def _counts(state: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers that say where a state stands: steps, and sensitivity batches before the first of them."""
    counts = {}
    for key in ("step", "measured"):
        if key in state:
            counts[key] = state[key]
    return counts


def _own(root: Path, wanted: str) -> Path:
    """Return the checkpoint of this run called `wanted`. Raises UserError naming those that exist."""
    path = root / wanted if Path(wanted).name == wanted else Path(wanted)
    names = []
    for folder in checkpoints(root):
        if folder.resolve() == path.resolve():
            return path
        names.append(folder.name)
    raise UserError(
        f"--resume_from_checkpoint {wanted} is no checkpoint of this run: {root} holds {', '.join(names) or 'none'}; "
        "give one of these, latest, or none to start over"
    )
