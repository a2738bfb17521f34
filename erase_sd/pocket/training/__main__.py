"""Train the pocket model again: VAE, oracle, then UNet and text encoder; each part resumes from its last checkpoint.

    make pocket                                       # fetches the artwork from npm first
    python -m erase_sd.pocket.training.__main__ --artwork FOLDER  # with the four npm packages in FOLDER

Both take about two hours on two cores.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from erase_sd.common.cli import knob, parse, run_main
from erase_sd.common.files import new_folder, write_atomic


@dataclass(frozen=True, kw_only=True)
class PocketTraining:
    """How to train the three parts."""

    artwork: str = knob("artwork", "folder with the four npm packages, packed or unpacked")
    work_dir: str = knob("runs/pocket", "checkpoints and cached latents")
    output_dir: str = knob("erase_sd/pocket", "where model/, oracle.safetensors and report.json go")
    vae_steps: int = knob(4000, "steps of the VAE, batch 32")
    oracle_steps: int = knob(2500, "steps of the oracle, batch 126")
    unet_steps: tuple[int, ...] = knob((4500, 4500, 1400), "steps of UNet and text encoder per cycle, batch 64")
    exam_images: int = knob(1280, "pictures on which the finished model is scored")
    seed: int = knob(0, "seed of every draw")


def main() -> int:
    """Train what is missing and write the model, the oracle and the report."""
    given = parse(sys.argv[1:], prog="pocket-train", description="Train the pocket model.", training=PocketTraining)
    knobs = PocketTraining(**given["training"])

    from erase_sd.pocket.training import artwork, report, unet, vae
    from erase_sd.pocket.training import oracle as judge

    work, out = Path(knobs.work_dir), Path(knobs.output_dir)
    known, others = artwork.load_sprites(knobs.artwork)
    coder = vae.train(known, work / "vae", steps=knobs.vae_steps, seed=knobs.seed)
    training, fresh = judge.split(others)
    oracle = judge.train(known, training, work / "oracle", steps=knobs.oracle_steps, seed=knobs.seed)
    write_atomic(out / "oracle.safetensors", judge.packed(oracle))
    denoiser = unet.train(coder, known, work / "unet", cycles=knobs.unet_steps, seed=knobs.seed)
    pipe = unet.assemble(coder, denoiser)
    with new_folder(out / "model") as folder:
        unet.save_half(pipe, folder)
    result = report.measure(oracle, coder, known, fresh, out / "model", knobs.exam_images)
    write_atomic(out / "report.json", json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    run_main(main)
