"""Is this folder, and the pipeline loaded from it, a sound Stable Diffusion 1.x or 2.x text-to-image model?

The libraries load much that cannot work: a partial UNet (meta tensors and a warning), a tokenizer folder without
files (a tokenizer of two tokens), NaN weights (which draw black images and so look perfectly erased). Every check
here ends in one UserError sentence that names the bad value and the next step.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open

from erase_sd.process import UserError

NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTED = ("unet", "vae", "text_encoder")
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
# What the libraries raise for broken, unknown or unreachable models; the Hub's own errors are OSError or ValueError.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError)


@contextmanager
def explained(option: str, source: str) -> Iterator[None]:
    """Turn what the libraries raise while loading into one sentence with the next step; our own checks pass through.

    Their log is muted meanwhile: it lists hundreds of tensor names where the checks below name the one that matters.
    """
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"{option} {source} {_advice(option, source, error)}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _advice(option: str, source: str, error: BaseException) -> str:
    if Path(source).is_dir():
        reason = shorten(str(error), 200, placeholder=" ...").rstrip(". ")
        return f"is not a complete diffusers model ({reason}): save it again with save_pretrained"
    while error.__cause__ or error.__context__:  # diffusers calls every failure a missing file; the root is the truth
        error = error.__cause__ or error.__context__
    reason = shorten(str(error), 200, placeholder=" ...").rstrip(". ")
    return (
        f"is no local folder and cannot be had from the Hugging Face Hub ({reason}): point {option} at a folder with "
        "a diffusers model, or use --model pocket, which runs offline"
    )


def check_place(source: str, option: str) -> None:
    """Refuse a path that does not exist: the libraries would take it for a Hub id and go looking on the network.

    A Hub id is "name" or "owner/name"; anything else, or anything below an existing folder, was meant as a path.
    """
    if source and Path(source).is_dir():
        return
    if Path(source).is_file():
        raise UserError(f"{option} {source} is a file: give the folder that save_pretrained wrote, or a Hub id")
    parts = source.split("/")
    if source.startswith((".", "~", os.sep)) or "\\" in source or len(parts) > 2 or not all(parts):
        raise UserError(f"{option} {source!r} does not exist: give an existing folder, or a Hub id like owner/name")
    if len(parts) == 2 and Path(parts[0]).is_dir():
        raise UserError(f"{option} {source}: the folder {parts[0]} has no {parts[1]}: check the spelling")


def check_index(index: dict, model: str) -> None:
    """`index` is the parsed model_index.json: refuse other model families before anything large is fetched."""
    components = {name: value for name, value in index.items() if isinstance(value, (list, tuple)) and value[0]}
    foreign = sorted(components.keys() - {*NEEDED, *OPTIONAL})
    if foreign:
        raise UserError(
            f"model {model} is a {index.get('_class_name')} with {', '.join(foreign)}: "
            "only Stable Diffusion 1.x and 2.x text-to-image models can be erased"
        )
    for name in NEEDED:
        if name not in components:
            raise UserError(f"model {model}: model_index.json names no {name}: save the whole pipeline again")


def check_folder(folder: Path, components: list[str]) -> None:
    """Every component's folder exists, has its weights, and no weight file is cut short (headers only are read)."""
    for name in components:
        part = folder / name
        if not part.is_dir():
            raise UserError(f"model folder {folder} has no {name}/: copy the whole pipeline, or save it again")
        if name in WEIGHTED:
            check_weight_files(part)


def check_weight_files(folder: Path) -> None:
    """The folder of one component has its config.json and at least one weight file, and all of them are readable."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: copy it from the base model, or save the pipeline again")
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise UserError(f"{folder} has no weight file: copy its .safetensors file, or save the pipeline again")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or incomplete ({error}): copy or download it again") from error


def check_pipeline(pipe: StableDiffusionPipeline, model: str) -> None:
    """The loaded parts are complete, finite and fit each other."""
    check_tokenizer(pipe, model)
    check_unet(pipe, model)
    for name in WEIGHTED:
        check_weights(getattr(pipe, name), name, model)


def check_text_encoder_file(encoder: torch.nn.Module, folder: Path) -> None:
    """transformers fills in random values for tensors that a file lacks and only logs it: compare the names.

    Files written before transformers 5.6 have the prefix "text_model.".
    """
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            stored |= {name.removeprefix("text_model.") for name in weights.keys()}  # noqa: SIM118 - not a dict
    missing = {name.removeprefix("text_model.") for name in encoder.state_dict()} - stored
    if stored and missing:
        raise UserError(f"{folder} has no value for {min(missing)}: its weight file is partial, give a complete one")


def check_tokenizer(pipe: StableDiffusionPipeline, model: str) -> None:
    """The tokenizer is the text encoder's own, not the empty shell that transformers makes of a wrong folder."""
    encoder = pipe.text_encoder.config
    if len(pipe.tokenizer) != encoder.vocab_size:
        raise UserError(
            f"model {model}: the tokenizer has {len(pipe.tokenizer)} tokens and the text encoder "
            f"{encoder.vocab_size}: copy the files of tokenizer/ from the base model"
        )
    if pipe.tokenizer.model_max_length != encoder.max_position_embeddings:
        raise UserError(
            f"model {model}: the tokenizer's model_max_length is {pipe.tokenizer.model_max_length}, the text "
            f"encoder's {encoder.max_position_embeddings}: copy tokenizer/tokenizer_config.json from the base model"
        )


def check_unet(pipe: StableDiffusionPipeline, model: str) -> None:
    """The UNet denoises this VAE's latents and nothing else, under this text encoder's embeddings."""
    unet, latent = pipe.unet.config, pipe.vae.config.latent_channels
    if unet.in_channels != latent:
        raise UserError(
            f"model {model}: the UNet takes {unet.in_channels} channels and the VAE makes {latent}: inpainting and "
            "other conditioned models cannot be erased, give the text-to-image model they were made from"
        )
    width = pipe.text_encoder.config.hidden_size
    if unet.cross_attention_dim != width:
        raise UserError(
            f"model {model}: the UNet expects text {unet.cross_attention_dim} wide and the text encoder gives "
            f"{width}: give the UNet and the pipeline of the same base model"
        )


def check_weights(part: torch.nn.Module, name: str, model: str) -> None:
    """No tensor is missing (left on the meta device by a partial file) and every value is finite."""
    for key, tensor in part.state_dict().items():
        if tensor.is_meta:
            raise UserError(
                f"model {model}: the {name} has no value for {key}, its weight file is partial: give a complete one"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"model {model}: {name} {key} has NaN or infinite values: give an undamaged model")
