"""The embedded model itself: what it is, how large, and that it draws what it is asked."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoPipelineForText2Image, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from erase_sd.models.pipeline import load, sample
from erase_sd.pocket import FOLDER
from erase_sd.pocket.oracle import WEIGHTS, name
from erase_sd.pocket.oracle import load as load_oracle
from erase_sd.pocket.prompt_sets import exam
from erase_sd.pocket.score import GUIDANCE, STEPS
from erase_sd.pocket.world import KINDS, caption


def pipeline_accuracy(n: int) -> dict[str, float]:
    """Return how often the pipeline shows what it is asked for, by kind, over n of all combinations."""
    questions = exam([], 0, n)
    prompts = [caption(question.scene) for question in questions]
    seeds = [question.seed for question in questions]
    pipe = load(str(FOLDER))
    images = sample(pipe, prompts, seeds, steps=STEPS, guidance=GUIDANCE, batch_size=64, description="pictures")
    right = dict.fromkeys(KINDS, 0)
    for seen, question in zip(name(load_oracle(), images), questions, strict=True):
        for kind in KINDS:
            right[kind] += seen[kind] == getattr(question.scene, kind)
    return {kind: count / n for kind, count in right.items()}


@pytest.fixture(scope="module")
def pocket() -> StableDiffusionPipeline:
    return load(str(FOLDER))


def test_it_is_a_genuine_stable_diffusion_pipeline(pocket: StableDiffusionPipeline) -> None:
    assert type(AutoPipelineForText2Image.from_pretrained(FOLDER)) is StableDiffusionPipeline
    assert isinstance(pocket.vae, AutoencoderKL)
    assert isinstance(pocket.unet, UNet2DConditionModel)
    assert isinstance(pocket.text_encoder, CLIPTextModel)
    assert isinstance(pocket.tokenizer, CLIPTokenizer)
    assert pocket.tokenizer.model_max_length == 77
    assert len(pocket.tokenizer) < 2000


def test_weights_are_small_half_precision_safetensors() -> None:
    files = [*FOLDER.rglob("*.safetensors"), WEIGHTS]
    assert sum(file.stat().st_size for file in files) <= 16_000_000
    assert WEIGHTS.stat().st_size <= 1_000_000
    assert not [file for file in FOLDER.parent.rglob("*") if file.suffix in {".bin", ".pt", ".pkl", ".svg", ".png"}]
    unet = UNet2DConditionModel.from_pretrained(FOLDER, subfolder="unet", dtype="auto")
    assert {p.dtype for p in unet.parameters()} <= {torch.float16, torch.float32}


def test_the_report_is_what_the_issue_asks() -> None:
    report = json.loads((Path(FOLDER).parent / "report.json").read_text())
    renders, coded, drawn = (report[k] for k in ("oracle on renders", "oracle on reconstructions", "pipeline"))
    assert renders["object"] >= 0.99
    assert renders["style"] >= 0.97
    assert renders["background"] >= 0.99
    assert min(coded.values()) >= 0.95
    assert drawn["object"] >= 0.95
    assert drawn["style"] >= 0.85
    assert drawn["background"] >= 0.97


def test_it_draws_what_it_is_asked() -> None:
    """A small sample of what `report.json` holds; the bounds leave room for its size only."""
    rates = pipeline_accuracy(128)
    assert rates["object"] >= 0.9
    assert rates["style"] >= 0.8
    assert rates["background"] >= 0.92


@pytest.mark.slow
def test_it_draws_what_it_is_asked_over_all_combinations() -> None:
    rates = pipeline_accuracy(1280)
    assert rates["object"] >= 0.95
    assert rates["style"] >= 0.85
    assert rates["background"] >= 0.97
