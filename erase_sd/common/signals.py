"""Stop on SIGTERM, SIGINT or the death of a launcher, after a checkpoint."""

import os
import signal
import threading
import time
from typing import Any, ClassVar, Self

PARENT = os.getppid()  # at import: a launcher may die while torch is still loading
LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # what accelerate launch and torchrun set


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
        """Return whether to stop: save, then exit with 128 + signum."""
        return self._set.is_set()

    def leave(self) -> None:
        """Exit with 128 + signum if the flag is set: for places where nothing is left half done."""
        if self.is_set():
            raise SystemExit(128 + self.signum)

    def __enter__(self) -> Self:
        if StopFlag._outermost is not None:
            return StopFlag._outermost
        if threading.current_thread() is threading.main_thread():
            StopFlag._outermost = self
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._handlers[signum] = signal.signal(signum, self._handle)
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
