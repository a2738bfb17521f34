"""A run as a process: signals, one run per folder, one-sentence errors. Import it through `erase_sd.runtime`."""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

PARENT = os.getppid()  # at import: a launcher may die while torch is still loading
LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # what accelerate launch and torchrun set


class UserError(ValueError):
    """A mistake only the user can correct; its text is one sentence that names the value and the next step."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Exit with main()'s code; a UserError becomes one sentence on stderr and code 2, Ctrl-C code 130."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


class StopFlag:
    """Set by the first SIGTERM or SIGINT inside its `with` block; a later second one raises KeyboardInterrupt.

    Blocks may be nested: an inner one yields the outermost flag, so that a signal is lost between no two of them.
    `accelerate launch` with one process does not forward signals, so the death of a launcher sets it as well. Outside
    the main thread, where Python handles no signals, it watches the launcher only.
    """

    POLL = 0.5  # seconds between two looks at the parent process
    GRACE = 1.0  # seconds in which a second signal is the launcher's copy of the first: torchrun and Slurm send both

    _outermost: ClassVar["StopFlag | None"] = None

    def __init__(self) -> None:
        self.signum: int = signal.SIGTERM
        self._set, self._left = threading.Event(), threading.Event()
        self._handlers: dict[int, Any] = {}
        self._since = 0.0

    def is_set(self) -> bool:
        """Whether to stop: save, then exit with 128 + signum."""
        return self._set.is_set()

    def leave(self) -> None:
        """Exit with 128 + signum if the flag is set: for places where nothing is left half done."""
        if self.is_set():
            raise SystemExit(128 + self.signum)

    def __enter__(self) -> "StopFlag":
        if StopFlag._outermost is not None:
            return StopFlag._outermost
        if threading.current_thread() is threading.main_thread():
            StopFlag._outermost = self
            self._handlers = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        if LAUNCHED & os.environ.keys():  # a shell may go (nohup), the launcher of a run may not
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if StopFlag._outermost is self:
            StopFlag._outermost = None
        self._left.set()
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: object) -> None:
        if not self.is_set():
            self.signum, self._since = signum, time.monotonic()
            self._set.set()
        elif time.monotonic() - self._since > self.GRACE:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while os.getppid() == PARENT:
            if self._left.wait(self.POLL):
                return
        self._set.set()


class RunLock:
    """Hold `folder` for one process; UserError when another one holds it. A killed process lets go of it."""

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder, ".lock")

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"another run is writing to {self.path.parent}: wait for it or choose another folder"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def claim(folder: Path, file: str, config: dict[str, Any]) -> None:
    """Refuse an --output_dir that holds anything but a run of this very configuration, before anything is written.

    `file` is where runs of this kind keep their configuration, as JSON.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: name a folder")
    if not (folder / file).is_file():
        if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(f"--output_dir {folder} holds other files: name an empty or a new folder")
        return
    try:
        there = dict(json.loads((folder / file).read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"--output_dir {folder} holds a {file} of something else: name another") from error
    for knob in sorted(there.keys() | config.keys()):
        if there.get(knob) != config.get(knob):
            raise UserError(
                f"--output_dir {folder} belongs to a run with {knob} {there.get(knob)}, not "
                f"{config.get(knob)}: name another folder or remove that one"
            )
