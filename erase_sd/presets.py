"""Named settings: the paper's, the released code's, and ours. What a preset leaves out has the knob's default.

The paper prints no k and no lambda for Stable Diffusion: the `authors-*` values are those of the released command
lines. One defect of that code is mended here: its batches were the same few images in every step, ours are shuffled.

Every method has "sd" and "pocket". `train_scope` says which weights it moves, and `anchor_model` "original" that it
learns from the network before any change, which costs a copy of it.
"""

POCKET = {  # the same pictures for every method, so that runs side by side draw them once
    "batch_size": 32,
    "sample_guidance": 3.5,
    "sample_steps": 15,
    "forget_images": 192,
    "retain_images": 384,
}
GENTLE = {"optimizer": "adamw", "schedule": "cosine", "train_scope": "full", "anchor_model": "current"}
ESD = GENTLE | {"schedule": "constant", "anchor_model": "original"}
CA = GENTLE | {"schedule": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0, "anchor_pictures": True}
UCE = {"train_scope": "kv", "anchor_model": "current"}
CONSTANT = GENTLE | {"schedule": "constant", "drop_captions": 0.0}  # as most released code trains
# SLD trains nothing: the least of weights and pictures that a job can do with.
SLD = {"train_scope": r"re:^(conv|proj)_out\.", "anchor_model": "current", "forget_images": 1, "retain_images": 1}
SLD_MAX = SLD | {"warmup": 0, "scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum": 0.7}

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
    "redirect_draws": 3,
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
            "projection": "after-preconditioning",  # which rounding of bf16 weights would undo, so not of "sd"
            "anchor_pictures": True,
            "lam": 1.0,
            "lr": 1.5e-4,
            "warmup_steps": 15,
            "steps": 300,
        }
        | POCKET,
    },
    "salun": {
        # SD/train-scripts/nsfw_removal.py: MSE to the current network's anchor + 0.1 L_r, one epoch of 800 pictures.
        "authors-nsfw": GENTLE
        | {"schedule": "constant", "mask_mode": "gradient", "redirect_weight": 10.0, "lr": 1e-6, "batch_size": 8}
        | {"steps": 100, "drop_captions": 0.0},
        # random_label.py: alpha 0.5, five epochs.
        "authors-cls": GENTLE
        | {"schedule": "constant", "mask_mode": "gradient", "redirect_weight": 2.0, "lr": 5e-6, "batch_size": 8}
        | {"steps": 500, "drop_captions": 0.0},
        "sd": GENTLE | {"redirect_weight": 2.0, "lr": 1e-5, "batch_size": 16, "steps": 125},
        "pocket": GENTLE | POCKET | {"redirect_weight": 2.0, "lr": 1e-4, "steps": 150},
    },
    "ascent": {
        # SalUn's SD/train-scripts/gradient_ascent.py: -L_f + 0.1 L_r, ten epochs, without a ceiling.
        "authors-cls": GENTLE
        | {"schedule": "constant", "alpha": 0.1, "lr": 1e-5, "batch_size": 8, "steps": 1000, "drop_captions": 0.0},
        # Noise has variance 1, so that a model which answers nothing has L_f = 1.
        "sd": GENTLE | {"alpha": 1.0, "forget_ceiling": 1.0, "lr": 1e-5, "batch_size": 16, "steps": 60},
        "pocket": GENTLE | POCKET | {"alpha": 3.0, "forget_ceiling": 1.0, "lr": 5e-5, "steps": 100},
    },
    "finetune": {
        "sd": GENTLE | {"lr": 1e-5, "batch_size": 16, "steps": 125},
        "pocket": GENTLE | POCKET | {"lr": 1e-4, "steps": 150},
    },
    "esd": {
        # The current code: 200 steps with batch 1. x for styles, u for nudity and objects.
        "esd-x": ESD | {"train_scope": "xattn", "lr": 5e-5, "batch_size": 1, "steps": 200},
        "esd-u": ESD | {"train_scope": "noxattn", "lr": 5e-5, "batch_size": 1, "steps": 200},
        # The paper's: target from the empty caption, eta 1, which is the same target.
        "paper": ESD
        | {"start": "nothing", "eta": 1.0, "train_scope": "xattn", "lr": 1e-5, "batch_size": 1, "steps": 1000},
        "sd": ESD | {"train_scope": "xattn", "lr": 1e-5, "batch_size": 8, "steps": 125},
        "pocket": ESD | POCKET | {"train_scope": "xattn", "eta": 4.0, "lr": 1e-4, "steps": 200},
    },
    "uce": {
        "authors": UCE
        | {
            "tokens": "last",
            "preserve_scale": 0.0,
        },  # trainscripts/uce_sd_erase.py, which preserves nothing by default
        "sd": UCE,
        "pocket": UCE | POCKET,
    },
    "concept-ablation": {
        # diffusers/train.py: base rate 2e-6, times 2 GPUs, times batches of 4; nudity: attn, 4e-6, 400 steps, prior.
        "authors": CA | {"train_scope": "kv", "lr": 1.6e-5, "batch_size": 8, "steps": 100},
        "authors-nudity": CA | {"train_scope": "attn", "prior": 1.0, "lr": 6.4e-5, "batch_size": 8, "steps": 400},
        "sd": CA | {"train_scope": "kv", "lr": 1.6e-5, "batch_size": 8, "steps": 100},
        "pocket": CA | POCKET | {"train_scope": "kv", "lr": 1e-4, "steps": 200},
    },
    "erasediff": {
        # sd/train_scripts/train_nsfw.sh: what its loop amounts to is L_r + F. "step 160 is enough".
        "authors-nsfw": CONSTANT
        | {"multiplier": "constant", "lam": 1.0, "train_scope": "noxattn", "lr": 1e-5, "batch_size": 16, "steps": 160},
        # train_cls.sh: "step 60".
        "authors-cls": CONSTANT | {"multiplier": "constant", "lam": 1.0, "lr": 1e-5, "batch_size": 16, "steps": 60},
        "sd": GENTLE | {"lr": 1e-5, "batch_size": 16, "steps": 160},
        "pocket": GENTLE | POCKET | {"eta": 0.5, "lr": 2e-4, "steps": 200},
    },
    "selective-amnesia": {
        # configs/forget_nudity.yaml: base rate 1e-5, times 4 GPUs, times batches of 4; 200 epochs of 1000 pictures
        # would be 12,500 steps a GPU. The Fisher information is measured another way: see the method.
        "authors-nudity": CONSTANT
        | {"anchor_pictures": True, "train_scope": "noxattn", "lr": 1.6e-4, "batch_size": 16, "steps": 12_500},
        "sd": GENTLE | {"anchor_pictures": True, "lr": 2e-5, "batch_size": 16, "steps": 500},
        "pocket": GENTLE
        | POCKET
        | {"anchor_pictures": True, "lam": 0.3, "fisher_batches": 20, "lr": 4e-4, "steps": 200},
    },
    "forget-me-not": {
        # configs/attn.yaml, less textual inversion.
        "authors": CONSTANT | {"lr": 2e-6, "weight_decay": 0.01, "max_grad_norm": 1.0, "batch_size": 1, "steps": 35},
        "sd": GENTLE | {"lr": 2e-6, "weight_decay": 0.01, "max_grad_norm": 1.0, "batch_size": 1, "steps": 35},
        "pocket": GENTLE | POCKET | {"lr": 6e-5, "weight_decay": 0.01, "max_grad_norm": 1.0, "steps": 35},
    },
    "sld": {
        # The authors' configurations; weak is that of diffusers, while ESD's scripts have s_S = 200.
        "weak": SLD | {"warmup": 15, "scale": 20.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum": 0.0},
        "medium": SLD | {"warmup": 10, "scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum": 0.4},
        "strong": SLD | {"warmup": 7, "scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum": 0.7},
        "max": SLD_MAX,
        "sd": SLD_MAX,
        "pocket": POCKET | SLD_MAX,
    },
}
