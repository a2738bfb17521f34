"""What does everything else stand on? The standard library, torch and PIL; nothing of ours.

cli        options made from dataclasses, one `command()` for every main, range checks
errors     UserError: a mistake only the user can correct
files      atomic writes, digests, locks, names of folders
signals    StopFlag: stop after a checkpoint
rng        keyed generators
processes  accelerator, trackers, shared work, pools of workers
imaging    contact sheets, pixelation, broken images
plotting   the house style of plots
"""
