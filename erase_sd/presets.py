"""Named settings: the paper's, the released code's, and ours. What a preset leaves out has the knob's default.

The paper prints no k and no lambda for Stable Diffusion: the `authors-*` values are those of the released command
lines. One defect of that code is mended here: its batches were the same few images in every step, ours are shuffled.
"""

AUTHORS = {
    "saliency": "summed",
    "strict": True,
    "trim_scope": "authors",
    "rank_scope": "full",
    "train_scope": "full",
    "projection": "off",
    "optimizer": "adamw",
    "lam": 0.1,
    "drop_captions": 0.0,
}

OURS = {
    "saliency": "contrast",
    "retain_loss": "original",
    "objective": "redirect",
    "constraint": "contrast",
    "projection": "on",
    "release_at": 0.0,
    "optimizer": "adamw",
    "schedule": "cosine",
}

PRESETS: dict[str, dict[str, dict]] = {
    "scissorhands": {
        # Algorithm 1 to the letter: signed Eq. 2 over all weights, plain SGD, ascent, projection at each step.
        "paper": {
            "saliency": "signed",
            "trim_scope": "full",
            "init": "uniform",
            "objective": "ascent",
            "constraint": "forget",
            "projection": "on",
            "optimizer": "sgd",
            "lam": 0.05,
            "drop_captions": 0.0,
        },
        # SD/shs_nsfw.py: global rank, two attention blocks re-initialised, redirect to the current network's anchor.
        "authors-nsfw": AUTHORS
        | {
            "fraction": 0.005,
            "init": "kaiming",
            "objective": "redirect",
            "anchor_model": "current",
            "lr": 1e-5,
            "batch_size": 16,
            "steps": 125,
        },
        # SD/shs_cls.py: ascent instead, other initial values.
        "authors-cls": AUTHORS
        | {"fraction": 0.001, "init": "truncated", "objective": "ascent", "lr": 2e-5, "batch_size": 8, "steps": 125},
        # Ours for Stable Diffusion: the released scale, shuffled data, projection. Not validated on SD v1.4 weights.
        "sd": OURS | {"fraction": 0.005, "lam": 0.5, "lr": 1e-5, "warmup_steps": 10, "batch_size": 16, "steps": 125},
        # Ours for the pocket model: measured, see the README; tuned on "cat", "neon style" and "blue background",
        # on no concept of that table.
        "pocket": OURS
        | {
            "fraction": 0.0025,
            "anchor_pictures": True,
            "lam": 1.0,
            "lr": 1.5e-4,
            "warmup_steps": 15,
            "batch_size": 32,
            "steps": 300,
            "sample_guidance": 3.5,
            "sample_steps": 15,
            "forget_images": 192,
            "retain_images": 384,
        },
    }
}
