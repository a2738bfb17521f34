"""Load, sample and save Stable Diffusion pipelines of diffusers."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoModel,
    DDPMScheduler,
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from erase_sd.doctor import (
    NEEDED,
    check_folder,
    check_index,
    check_pipeline,
    check_place,
    check_text_encoder_file,
    check_weight_files,
    explained,
)
from erase_sd.runtime import generator, new_folder


def load(model: str, *, unet: str | None = None, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x or 2.x text-to-image pipeline on the CPU, checked and without a safety checker.

    `model` is a folder or a Hub id; `unet` replaces its UNet by that of a run: a folder with unet/ (or the UNet's own
    folder), or a Hub id. `dtype` holds for every part, float32 by default. Raises UserError for a model that is
    missing, incomplete, damaged or of another kind.
    """
    check_place(model, "--model")
    dtype = dtype or torch.float32
    replaced = {"unet": load_network(unet, "unet", dtype)} if unet else {}
    with explained("--model", model):
        check_index(StableDiffusionPipeline.load_config(model), model)
        if Path(model).is_dir():
            check_folder(Path(model), [name for name in NEEDED if name not in replaced])
        pipe = StableDiffusionPipeline.from_pretrained(
            model,
            dtype=dtype,
            safety_checker=None,
            feature_extractor=None,  # serves the safety checker only
            requires_safety_checker=False,
            **replaced,
        )
    check_pipeline(pipe, model)
    if Path(model).is_dir():
        check_text_encoder_file(pipe.text_encoder, Path(model) / "text_encoder")
    return pipe


def load_network(source: str, part: str, dtype: torch.dtype) -> ModelMixin:
    """The denoising network ("unet" or "transformer") of a run folder, of its own folder, or of a Hub repository.

    Raises UserError for a network that is missing, incomplete or damaged.
    """
    check_place(source, f"--{part}")
    own_folder = (Path(source) / "config.json").is_file()
    with explained(f"--{part}", source):
        if Path(source).is_dir():
            check_weight_files(Path(source) if own_folder else Path(source) / part)
        return AutoModel.from_pretrained(source, subfolder=None if own_folder else part, dtype=dtype)


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, prompts: list[str], batch_size: int = 32) -> Tensor:
    """The text conditioning of `prompts` as the pipeline itself uses it: (N, L, D), float32, on the CPU."""
    device = pipe.text_encoder.device
    chunks = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    return torch.cat([pipe.encode_prompt(chunk, device, 1, False)[0].float().cpu() for chunk in chunks])


def sample(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 32,
    size: int | None = None,
    output_type: str = "pil",
    description: str | None = None,
) -> list[Image.Image] | list[Tensor]:
    """One image per prompt and seed, the same whatever the batch size and order; `pipe` is left as it was.

    `size` is the side in pixels, by default the model's own. `output_type` is "pil", or "latent" for tensors
    (C, H, W), float32, on the CPU. With a `description` the first process shows a progress bar over images.
    """
    quiet = _working_copy(pipe)
    jobs = list(zip(prompts, seeds, strict=True))
    hidden = description is None or os.environ.get("RANK", "0") != "0"
    images = []
    with tqdm(total=len(jobs), desc=description, unit="image", disable=hidden) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            drawn = draw(
                quiet,
                [prompt for prompt, _ in batch],
                [generator(seed, "image") for _, seed in batch],
                steps=steps,
                guidance=guidance,
                size=(size, size),
                output_type=output_type,
            )
            images += list(drawn.float().cpu()) if output_type == "latent" else drawn
            bar.update(len(drawn))
    return images


def draw(
    pipe: DiffusionPipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    *,
    steps: int,
    guidance: float,
    size: tuple[int | None, int | None] = (None, None),
    output_type: str = "pil",
) -> Any:
    """One batch of any text-to-image pipeline, each image from its own generator; `size` is (width, height) in pixels.

    Returns what the pipeline makes of `output_type`: PIL images, or an array (n, height, width, 3) in [0, 1] for "np".
    """
    return pipe(
        prompt=prompts,
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type=output_type,
    ).images


def _working_copy(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A pipeline of the same modules with a scheduler of its own, no inner bar, and no safety checker: it paints
    images black, which every later score would take for erasure."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    parts = pipe.components | {"scheduler": scheduler, "safety_checker": None}
    copy = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    copy.set_progress_bar_config(disable=True)
    return copy


def training_scheduler(pipe: StableDiffusionPipeline) -> DDPMScheduler:
    """The forward process the model was trained on: the same betas and prediction type as the pipeline's sampler."""
    return DDPMScheduler.from_config(pipe.scheduler.config)


def save_unet(unet: UNet2DConditionModel, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write `unet` to folder/unet, whole or not at all, for `from_pretrained(folder, subfolder="unet")`.

    `dtype` is that of the file, by default the model's own. Raises FloatingPointError, with nothing written, if a
    weight is not finite in that dtype. `unet` itself is not changed.
    """
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in unet.state_dict().items()}
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(f"UNet weight {name} has NaN or infinite values: nothing was saved")
    target = Path(folder) / "unet"
    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
    copy.load_state_dict(weights, assign=True)
    with new_folder(target) as temporary:
        copy.save_pretrained(str(temporary))
        _scrub(Path(temporary) / copy.config_name)
    return target


def _scrub(config: Path) -> None:
    """Drop the path the model was loaded from: it names the user's own folders."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
