"""A run's folder: one configuration, one process, checkpoints while it works, results when it is done."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.files import RunLock, claim, remove_leftovers, write_atomic
from erase_sd.run.checkpoints import checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from erase_sd.run.record import write_status

# The tensors of a method's state: the optimiser's, what else it must not recompute, and sums before the first step.
PARTS = ("optimizer", "kept", "sums")
CONFIG = "job.json"  # not config.json, by which diffusers and our own loader tell the folder of a model


class Progress(NamedTuple):
    """Where a run stands: the method's state, the trace so far, entries re-initialised per parameter."""

    state: dict[str, Any] | None  # None before the first record
    trace: list[dict]
    changed: dict[str, int]

    def mapped(self, change: Callable[[Mapping], Mapping]) -> Progress:
        """The progress with the tensors of its state changed."""
        return self._replace(state=self.state | {part: change(self.state.get(part, {})) for part in PARTS})

    def after(self, record: dict, state: dict[str, Any] | None) -> Progress:
        """The progress after one more record of the method: nothing yet, the trim, or a step; NaN becomes None."""
        if state is None:
            return self
        if "changed" in record:
            return self._replace(state=state, changed=record["changed"])
        if "phase" in record:
            return self._replace(state=state)
        row = {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in record.items()}
        return self._replace(state=state, trace=[*self.trace, row])


class RunFolder:
    """Use in a `with` block; UserError if another process, configuration or other files are already there.

    Starting from nothing, or from an earlier checkpoint, loses nothing at once: what is there goes when the first new
    checkpoint is whole, and a complete run stays as it is.

    Of several processes one `writes`; the others read the same folder, and everything they write is left undone.
    """

    def __init__(
        self,
        path: str | Path,
        config: dict[str, Any],
        writes: bool = True,
        limit: int | None = 1,
        start: str | None = "latest",
    ) -> None:
        self.path, self.config, self.writes = Path(path), json.loads(json.dumps(config)), writes
        self.limit = limit  # checkpoints that are kept, None for all
        self.start = start  # the one to go on from: "latest", a name or path, None for none

    def __enter__(self) -> RunFolder:
        claim(self.path, CONFIG, self.config)
        if self.start not in ("latest", None) and not self.complete():
            _own(self.path / "checkpoints", self.start)  # now, not after hours of drawing
        self._stack = ExitStack()
        if self.writes:
            self._stack.enter_context(RunLock(self.path))
            remove_leftovers(self.path)
            write_atomic(self.path / CONFIG, json.dumps(self.config, indent=2) + "\n")
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def complete(self) -> dict | None:
        """The record of a run that is already done, else None."""
        status, run = self.path / "status.json", self.path / "run.json"
        if status.is_file() and run.is_file() and json.loads(status.read_text())["state"] == "complete":
            return json.loads(run.read_text())
        return None

    def status(self, state: str, code: int = 0, message: str = "") -> None:
        """Say how the run stands: running, complete, stopped or failed."""
        if self.writes:
            write_status(self.path, state, code, message)

    def save(self, weights: dict[str, Tensor], progress: Progress) -> None:
        """Write a checkpoint; older ones go when this one is whole."""
        if not self.writes:
            return
        state = progress.state
        tensors: dict[str, Tensor] = {f"weights/{name}": p.detach() for name, p in weights.items()}
        for part in PARTS:
            tensors |= {f"{part}/{name}": x for name, x in state.get(part, {}).items()}
        meta = {"trace": progress.trace, "changed": progress.changed}
        meta |= {key: state[key] for key in ("step", "measured") if key in state}
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
        state = {part: local(tensors.below(f"{part}/")) for part in PARTS}
        counts = {key: meta[key] for key in ("step", "measured") if key in meta}
        return Progress(counts | state, meta["trace"], meta["changed"])

    def forget_checkpoints(self) -> None:
        """Remove the checkpoints: the results have replaced them."""
        if self.writes:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


def _own(root: Path, wanted: str) -> Path:
    """The checkpoint of this run called `wanted`. Raises UserError naming those that exist."""
    path = root / wanted if Path(wanted).name == wanted else Path(wanted)
    there = checkpoints(root)
    if path.resolve() not in [folder.resolve() for folder in there]:
        names = ", ".join(folder.name for folder in there) or "none"
        raise UserError(
            f"--resume_from_checkpoint {wanted} is no checkpoint of this run: {root} holds {names}; "
            "give one of these, latest, or none to start over"
        )
    return path
