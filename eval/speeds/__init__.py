"""The benchmarks of `python -m eval.speed`, one file each: a ratio to a named alternative, measured in the same run.

Rounds alternate between the ways that are compared, so that other work on the machine slows all of them, and the
median of the rounds' ratios counts. Memory is the peak of a fresh process.

    knobs.py   what there is to choose        clock.py   rounds, ratios, operation counts
    parts.py   Stable Diffusion from config   fresh.py   a fresh process and its peak memory
"""
