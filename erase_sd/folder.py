"""A run's folder: one configuration, one process, checkpoints while it works, results when it is done."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from erase_sd.process import RunLock, claim
from erase_sd.record import write_status
from erase_sd.runtime import latest_checkpoint, load_checkpoint, save_checkpoint, write_atomic

PARTS = ("optimizer", "kept")  # the tensors of a method's state: the optimiser's, and what else it must not recompute
CONFIG = "job.json"  # not config.json, by which diffusers and our own loader tell the folder of a model


class Progress(NamedTuple):
    """Where a run stands: the method's state, the trace so far, entries re-initialised per parameter."""

    state: dict[str, Any] | None  # None before the first record
    trace: list[dict]
    changed: dict[str, int]

    def after(self, record: dict, state: dict[str, Any] | None) -> Progress:
        """The progress after one more record of the method: nothing yet, the trim, or a step; NaN becomes None."""
        if state is None:
            return self
        if "changed" in record:
            return self._replace(state=state, changed=record["changed"])
        row = {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in record.items()}
        return self._replace(state=state, trace=[*self.trace, row])


class RunFolder:
    """Use in a `with` block; UserError if another process, configuration or other files are already there.

    Of several processes one `writes`; the others read the same folder, and everything they write is left undone.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], writes: bool = True) -> None:
        self.path, self.config, self.writes = Path(path), json.loads(json.dumps(config)), writes

    def __enter__(self) -> RunFolder:
        claim(self.path, CONFIG, self.config)
        self._stack = ExitStack()
        if self.writes:
            self._stack.enter_context(RunLock(self.path))
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
        """Write a checkpoint; the one before goes when this one is whole."""
        if not self.writes:
            return
        tensors: dict[str, Tensor] = {f"weights/{name}": p.detach() for name, p in weights.items()}
        for part in PARTS:
            tensors |= {f"{part}/{name}": x for name, x in progress.state.get(part, {}).items()}
        step = progress.state["step"]
        meta = {"step": step, "trace": progress.trace, "changed": progress.changed}
        save_checkpoint(self.path / "checkpoints", step, tensors, meta, limit=1)

    def resume(self, weights: dict[str, Tensor]) -> Progress | None:
        """Put the newest whole checkpoint's weights into `weights`; None if there is no checkpoint."""
        found = latest_checkpoint(self.path / "checkpoints")
        if found is None:
            return None
        tensors, meta = load_checkpoint(found)
        for name, p in weights.items():
            p.data.copy_(tensors[f"weights/{name}"])
        state = {part: tensors.below(f"{part}/") for part in PARTS}
        return Progress({"step": meta["step"], **state}, meta["trace"], meta["changed"])

    def forget_checkpoints(self) -> None:
        """Remove the checkpoints: the results have replaced them."""
        if self.writes:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
