"""How fast is it, and how much memory does it take, against a named alternative measured in the same run?

clock.py        alternating rounds, median ratios, exact operation counts
fresh.py        work in a fresh process, and its peak of resident memory
fakes.py        Stable Diffusion from its configuration, with random weights
settings.py     the sizes of every benchmark
topk.py         exact top k against concatenation and kthvalue
projection.py   the closed form against a float64 quadratic program on the host
step.py         a repair step against a fine-tuning step
caching.py      cached latents against encoding in the loop
memory.py       peak memory of the main job
detector.py     NudeNet here against its own package
gpu.py          images a second, a repair step, share of the hardware's peak
"""
