"""A setup of toy pipelines, random pictures of "the concept" and a judge that goes by a picture's brightness."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from erase_sd.common.rng import generator
from erase_sd.models.pipeline import load
from eval.attacks.base import AttackedConcept, AttackJudge, AttackSampling, AttackSetup, AttackTarget
from tests.conftest import tiny_pipeline

CONCEPT = AttackedConcept(
    name="penguin",
    kind="object",
    words=("penguin",),
    pairs=(("a penguin on ice", "something on ice"), ("a penguin", "something")),
    company="a dog",
    wordings=("seabird",),
)
TARGETS = [AttackTarget(row=i, prompt=f"a penguin on {place}", seed=7 + i) for i, place in enumerate(("ice", "sand"))]


def bright(images: list[Image.Image]) -> list[bool]:
    """About half of what toys draw is brighter than this."""
    return [float(np.asarray(image).mean()) > 127 for image in images]


BRIGHT = AttackJudge(name="bright", key="0" * 64, shows=bright)


def never(images: list[Image.Image]) -> list[bool]:
    return [False for _ in images]


NEVER = AttackJudge(name="never", key="1" * 64, shows=never)


@pytest.fixture(scope="session")
def toys(request: pytest.FixtureRequest) -> Callable[[str], DiffusionPipeline]:
    """toys("tiny_sdxl"): a copy of one of the toy pipelines, built once; "tiny_sd" without a folder."""
    built: dict[str, DiffusionPipeline] = {}

    def toy(name: str) -> DiffusionPipeline:
        if name not in built:
            built[name] = tiny_pipeline() if name == "tiny_sd" else load(str(request.getfixturevalue(name)))
        return copy.deepcopy(built[name])

    return toy


@pytest.fixture
def make_setup(toys: Callable[[str], DiffusionPipeline]) -> Callable[..., AttackSetup]:
    """make_setup(pipe, original=..., judge=...): four channels of latents, eight pixels a side."""

    def make(
        pipe: DiffusionPipeline | None = None,
        original: DiffusionPipeline | None = None,
        judge: AttackJudge = BRIGHT,
    ) -> AttackSetup:
        pipe = pipe or toys("tiny_sd")
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        channels = pipe.vae.config.latent_channels
        z = torch.randn(6, channels, 8, 8, generator=generator(0, "latents"))
        return AttackSetup(
            pipe=pipe,
            original=original or pipe,
            concept=CONCEPT,
            judge=judge,
            sampling=AttackSampling(steps=4, guidance=3.0, size=64, batch_size=4),
            seed=0,
            references={target.row: z[target.row] for target in TARGETS},
            captions=("a penguin", "a penguin on ice", "two penguins", "a small penguin"),
            examples=z[2:],
        )

    return make
