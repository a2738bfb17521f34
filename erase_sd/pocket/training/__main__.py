"""Train the pocket model again: oracle, VAE, text encoder and UNet; every part resumes from its last checkpoint.

make pocket                                                       # fetches the artwork from npm first
make retrain                                                      # the UNet that never saw the held-out concepts
python -m erase_sd.pocket.training --artwork FOLDER --part oracle # one part, with what it needs
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from erase_sd.common.cli import knob, parse, run_main
from erase_sd.common.files import new_folder, replace_between, write_atomic
from erase_sd.pocket.training import artwork, oracle, report, unet, vae
from erase_sd.pocket.training.oracle import Oracle64
from erase_sd.pocket.training.report import table
from erase_sd.pocket.training.unet import Denoiser

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PocketTraining:
    """How to train the parts."""

    artwork: str = knob(
        "artwork",
        "folder with the four npm packages, packed or unpacked, or the sprites.safetensors of a former training",
    )
    part: Literal["oracle", "vae", "unet", "sharpen", "report", "all", "retrain"] = knob(
        "all", "what to train, after what it needs: each is taken from its checkpoint if it is finished"
    )
    work_dir: str = knob("runs/pocket", "checkpoints and cached latents")
    output_dir: str = knob("docs/results/second_edition", "where model/, oracle.safetensors, report.json, retrain/ go")
    oracle_steps: tuple[int, ...] = knob((1800, 1000), "steps of the oracle per cycle, batch 46")
    vae_steps: int = knob(2800, "steps of the VAE, batch 8")
    unet_steps: tuple[int, ...] = knob((2400, 3000), "steps of UNet and text encoder per cycle, batch 32")
    sharpen_steps: int = knob(1500, "steps of the decoder alone, after the UNet, batch 8")
    exam_images: int = knob(1280, "pictures on which the finished model is scored, in each wording")
    seed: int = knob(0, "seed of every draw")
    device: str = knob("cpu", "where networks learn; pictures are rendered on the CPU")


class Workshop:
    """The parts, each trained or taken from its finished checkpoint when it is asked for."""

    def __init__(self, given: PocketTraining) -> None:
        self.given, self.work, self.out = given, Path(given.work_dir), Path(given.output_dir)
        self.known, others = artwork.load_sprites(given.artwork)
        artwork.save_sprites(self.known, others, self.work / "sprites.safetensors")
        self.others, self.strangers = oracle.split(others)

    def oracle(self) -> Oracle64:
        """Train the oracle and write its weights."""
        judge = self._oracle(self.given.oracle_steps)
        write_atomic(self.out / "oracle.safetensors", oracle.packed(judge))
        return judge

    def _oracle(self, cycles: tuple[int, ...]) -> Oracle64:
        return oracle.train(
            self.known,
            self.others,
            self.work / "oracle",
            cycles=cycles,
            seed=self.given.seed,
            device=self.given.device,
        )

    def vae(self) -> AutoencoderKL:
        """Train the VAE; an oracle after its first cycle is teacher enough."""
        return vae.train(
            self.known,
            self._oracle(self.given.oracle_steps[:1]),
            self.work / "vae",
            steps=self.given.vae_steps,
            seed=self.given.seed,
            device=self.given.device,
        )

    def latents(self) -> tuple[Tensor, Tensor]:
        """Encode the renders that the UNet learns from, once."""
        return unet.encoded(self.vae, self.known, self.work / "unet", unet.RENDERS, self.given.seed)

    def unet(self) -> Denoiser:
        """Train the UNet and the text encoder."""
        latents, labels = self.latents()
        return unet.train(
            latents,
            labels,
            self.work / "unet",
            cycles=self.given.unet_steps,
            seed=self.given.seed,
            device=self.given.device,
        )

    def sharpen(self) -> AutoencoderKL:
        """Train the VAE's decoder on."""
        coder = self.vae()
        steps, seed = self.given.sharpen_steps, self.given.seed
        vae.sharpen(
            coder, self.known, self._oracle(self.given.oracle_steps[:1]), self.work / "sharpen", steps=steps, seed=seed
        )
        return coder

    def all(self) -> dict:
        """Train what is missing, write the model as a folder of diffusers, and score it."""
        pipe = unet.assemble(self.sharpen(), self.unet())
        with new_folder(self.out / "model") as folder:
            unet.save_half(pipe, folder)
        return self.report()

    def report(self) -> dict:
        """Score the model that was written."""
        return report.measure(
            self.oracle(), self.sharpen(), self.known, self.strangers, self.out / "model", self.given.exam_images
        )

    def retrain(self) -> dict:
        """Train the UNet on data without the held-out concepts, by the same recipe, and score it."""
        latents, labels = unet.without(*self.latents(), unet.HELD_OUT)
        whole = self.unet()
        model = unet.train(
            latents,
            labels,
            self.work / "retrain",
            cycles=self.given.unet_steps,
            seed=self.given.seed,
            device=self.given.device,
            text_encoder=whole.text_encoder,
        )
        with new_folder(self.out / "retrain") as folder:
            unet.save_unet(model.unet, folder)
        with new_folder(self.work / "retrain" / "model") as folder:
            unet.save_half(unet.assemble(self.sharpen(), model), folder)
        scored = self.work / "retrain" / "model"
        return report.retrain_scores(self.oracle(), scored, unet.HELD_OUT, self.given.exam_images // 4)


def publish(result: dict, out: Path, name: str) -> None:
    """Write scores as JSON, and as a table into the page beside it that has marks for them."""
    write_atomic(out / f"{name}.json", json.dumps(result, indent=2) + "\n")
    rows = "\n".join(["| what | share | 95 % (Wilson) | n |", "|---|---|---|---|", *table(result), ""])
    print(rows)
    if (out / "README.md").is_file():
        replace_between(out / "README.md", name, rows)


def main() -> int:
    """Train what is asked for and write the scores of what was finished."""
    given = parse(sys.argv[1:], prog="pocket-training", description="Train the pocket model.", training=PocketTraining)
    workshop = Workshop(PocketTraining(**given["training"]))
    result = getattr(workshop, workshop.given.part)()
    if isinstance(result, dict):
        publish(result, workshop.out, "retrain" if workshop.given.part == "retrain" else "report")
    return 0


if __name__ == "__main__":
    run_main(main)
