"""Jobs that die at a chosen moment: reads one JSON request per line and answers with how that job ended.

A moment is the n-th call or return of any function, Python's or C's, inside one stage of the job: unlike a time on the
clock it is the same on every machine. `delay` is how many seconds later the kernel ends the process, which may be
inside one call. Every job is forked from this process, so that the libraries are imported only once.
"""

import contextlib
import json
import os
import signal
import sys
import types

STAGES = {  # the functions whose inside is the stage
    "previews": ("concept.py", "preview"),
    "sampling": ("samples.py", "collect"),
    "sensitivity": ("sensitivity.py", "averages"),
    "repair": ("repair.py", "_step"),
    "saving": ("checkpoints.py", "save_checkpoint"),
    "results": ("results.py", "write_results"),
    "finish": ("folder.py", "finish"),
}


class Clock:
    """Counts what happens inside each stage, and strikes once."""

    def __init__(self, stage: str = "", at: int = 0, signum: int = signal.SIGKILL, delay: float = 0.0) -> None:
        self.stage, self.at, self.signum, self.delay = stage, at, signum, delay
        self.stages = {place: name for name, place in STAGES.items()}
        self.functions = {function for _, function in STAGES.values()}
        self.inside: list[str] = []
        self.seen = dict.fromkeys(STAGES, 0)

    def __call__(self, frame: types.FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event in ("call", "return") and code.co_name in self.functions:
            stage = self.stages.get((os.path.basename(code.co_filename), code.co_name))
            if stage and event == "call":
                self.inside.append(stage)
            elif stage:
                self.inside.remove(stage)
        for stage in self.inside:
            self.seen[stage] += 1
            if stage == self.stage and self.seen[stage] == self.at:
                self.strike()

    def strike(self) -> None:
        if self.delay:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process as SIGKILL does, unhandled
            signal.setitimer(signal.ITIMER_REAL, self.delay)
        else:
            os.kill(os.getpid(), self.signum)


def work(argv: list[str], log: str, moment: dict) -> None:
    """The child: the job, its output in a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from erase_sd import train

    clock, code = Clock(**moment), 1
    if moment:
        sys.setprofile(clock)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            code = train.main(argv)
    except SystemExit as stopped:
        code = stopped.code
    finally:
        sys.setprofile(None)
        print("\nEVENTS", json.dumps(clock.seen))
        sys.stdout.flush()
    os._exit(code)


def main() -> None:
    import diffusers
    import matplotlib.pyplot as plt
    import transformers

    from erase_sd import train  # noqa: F401
    from erase_sd.api import carry_out  # noqa: F401
    from erase_sd.denoising import samples

    for name in ("StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL", "PNDMScheduler", "DDPMScheduler"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)
    plt.close(plt.figure())
    samples.CHUNK = 2
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            work(**request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
