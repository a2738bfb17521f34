"""What costs how much: `python -m eval.speed [topk] [projection] [step] [caching] [memory] [activations] ...`.

Every line is a ratio to a named alternative that was measured in the same run; see `eval.timing`.
"""

from __future__ import annotations

import importlib
import os
import sys

from erase_sd.common.cli import parse, quiet, run_main
from eval.timing.settings import DetectorTiming, Network, Projection, TimingSuite, TopK

GROUPS = {"suite": TimingSuite, "topk": TopK, "projection": Projection, "network": Network, "detector": DetectorTiming}
BENCHMARKS = {  # file in eval/timing: the group of its sizes
    "topk": "topk",
    "projection": "projection",
    "step": "network",
    "caching": "network",
    "memory": "network",
    "activations": "network",
    "detector": "detector",
    "gpu": "network",
}


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen benchmarks and print line by line."""
    argv = sys.argv[1:] if argv is None else argv
    given = parse(argv, prog="eval.speed", description="Measure speed and memory, as ratios.", **GROUPS)
    sizes = {}
    for name, options in GROUPS.items():
        sizes[name] = options(**given[name])
    suite = sizes["suite"]
    os.environ["TQDM_DISABLE"] = "1"  # read at import, here and in fresh processes: hence the late imports below
    quiet()
    print(importlib.import_module("eval.timing.clock").machine(), flush=True)
    for name in suite.benchmarks or BENCHMARKS:
        benchmark = importlib.import_module(f"eval.timing.{name}")
        for line in benchmark.lines(suite, sizes[BENCHMARKS[name]]):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
