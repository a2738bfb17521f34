"""Is this folder, and the pipeline loaded from it, a sound text-to-image model of a family that can be erased?

The libraries load much that cannot work: a partial UNet (meta tensors and a warning), a tokenizer folder without
files (a tokenizer of two tokens), NaN weights (whose images are black and so look perfectly erased). Every check
here ends in one UserError sentence that names the bad value and the next step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from erase_sd.common.errors import UserError
from erase_sd.models.families import FAMILIES, family, modules, network

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WEIGHTLESS = ("tokenizer", "scheduler")  # how the names of components without weights begin
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3")
# What the libraries raise for broken, unknown or unreachable models; the Hub's own errors are OSError or ValueError.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError)


@contextmanager
def explained(option: str, source: str) -> Iterator[None]:
    """Turn what the libraries raise while loading into one sentence with the next step; our own checks pass through.

    Their log is muted meanwhile: it lists hundreds of tensor names where the checks below name the one that matters.
    """
    levels: dict[logging.Logger, int] = {}
    for name in ("diffusers", "transformers"):
        logger = logging.getLogger(name)
        levels[logger] = logger.level
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"{option} {source} {_advice(option, source, error)}") from error
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _advice(option: str, source: str, error: BaseException) -> str:
    """Return what is wrong with a source that does not load, and the next step."""
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


def check_single_file(model: str, config: str | None) -> str:
    """Return the layout of a single-file model. Refuses what is no .safetensors: reading a pickle runs its code."""
    if Path(model).suffix != ".safetensors":
        raise UserError(f"--model {model} is no .safetensors file: convert it, or give the folder of save_pretrained")
    if config is None:
        raise UserError(f"--model {model} does not say how it is laid out: give --model_config, a folder or a Hub id")
    return config


def check_index(index: dict, model: str) -> str:
    """Return the pipeline class of a parsed model_index.json; refuses other families before anything is fetched."""
    components: set[str] = set()
    for name, value in index.items():
        if isinstance(value, list | tuple) and value[0]:
            components.add(name)
    kind = index.get("_class_name")
    needed = FAMILIES[kind].needed if kind in FAMILIES else ()
    foreign = sorted(components - {*needed, *OPTIONAL})
    if kind not in FAMILIES or foreign:
        known = ", ".join(FAMILIES)
        raise UserError(f"model {model} is a {kind} with {', '.join(foreign)}: only {known} can be erased")
    for name in needed:
        if name not in components:
            raise UserError(f"model {model}: model_index.json names no {name}: save the whole pipeline again")
    return kind


def check_folder(folder: Path, components: list[str]) -> None:
    """Check that every component's folder has its weights, and that no weight file is cut short (by its header)."""
    for name in components:
        part = folder / name
        if not part.is_dir():
            raise UserError(f"model folder {folder} has no {name}/: copy the whole pipeline, or save it again")
        if not name.startswith(WEIGHTLESS):
            check_weight_files(part)


def check_weight_files(folder: Path) -> None:
    """Check that the folder of one component has its config.json and a weight file, and that all are readable."""
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


def check_pipeline(pipe: DiffusionPipeline, model: str) -> None:
    """Check that the loaded parts are complete, finite and fit each other."""
    for name, encoder in modules(pipe).items():
        if name.startswith("text_encoder"):
            check_tokenizer(pipe.components[name.replace("text_encoder", "tokenizer")], encoder.config, model)
    check_network(pipe, model)
    for name, part in modules(pipe).items():
        check_weights(part, name, model)


def check_text_encoder_files(pipe: DiffusionPipeline, folder: Path) -> None:
    """Check that the files of the text encoders have a value for every tensor.

    transformers fills in random values for tensors that a file lacks and only logs it. Files written before
    transformers 5.6 have the prefix "text_model."; tied tensors, which share their memory, are stored once.
    """
    for part, encoder in modules(pipe).items():
        if not part.startswith("text_encoder"):
            continue
        stored = _stored_names(folder / part)
        missing: list[str] = []
        found: set[int] = set()
        for name, x in encoder.state_dict().items():
            if name.removeprefix("text_model.") in stored:
                found.add(x.data_ptr())
        for name, x in encoder.state_dict().items():
            if x.data_ptr() not in found:
                missing.append(name.removeprefix("text_model."))
        if stored and missing:
            raise UserError(f"{folder / part} has no value for {min(missing)}: its weight file is partial")


def _stored_names(folder: Path) -> set[str]:
    """Return the names of all tensors in a folder's .safetensors files, without the prefix "text_model."."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in list(weights.keys()):
                names.add(name.removeprefix("text_model."))
    return names


def check_tokenizer(tokenizer: Any, encoder: Any, model: str) -> None:
    """Check that the tokenizer is the text encoder's own, not the empty one that transformers makes of a wrong folder.

    `encoder` is the text encoder's config. CLIP knows a tokenizer's tokens and no more; T5's table is padded.
    """
    clip = hasattr(encoder, "max_position_embeddings")
    fits = len(tokenizer) == encoder.vocab_size if clip else 2 < len(tokenizer) <= encoder.vocab_size
    if not fits:
        sizes = f"{len(tokenizer)} tokens and the text encoder {encoder.vocab_size}"
        raise UserError(f"model {model}: the tokenizer has {sizes}: copy the files of tokenizer/ from the base model")
    if clip and tokenizer.model_max_length != encoder.max_position_embeddings:
        raise UserError(
            f"model {model}: the tokenizer's model_max_length is {tokenizer.model_max_length}, the text "
            f"encoder's {encoder.max_position_embeddings}: copy tokenizer/tokenizer_config.json from the base model"
        )


def check_network(pipe: DiffusionPipeline, model: str) -> None:
    """Check that the network denoises this VAE's latents and nothing else, under these text encoders' embeddings."""
    kind = family(pipe)
    config, latent = network(pipe).config, kind.patch * pipe.vae.config.latent_channels
    if config.in_channels != latent:
        raise UserError(
            f"model {model}: the {kind.part} takes {config.in_channels} channels and the VAE makes {latent}: "
            "inpainting and other conditioned models cannot be erased, give the text-to-image model behind this one"
        )
    key, theirs, encoders = kind.widths
    width = 0
    for name in encoders:
        width += getattr(getattr(pipe, name).config, theirs)
    if config[key] != width:
        raise UserError(
            f"model {model}: the {kind.part} expects text {config[key]} wide and the text encoder gives "
            f"{width}: give the {kind.part} and the pipeline of the same base model"
        )


def check_weights(part: torch.nn.Module, name: str, model: str) -> None:
    """Check that no tensor is missing (left on the meta device by a partial file) and that every value is finite."""
    for key, tensor in part.state_dict().items():
        if tensor.is_meta:
            raise UserError(
                f"model {model}: the {name} has no value for {key}, its weight file is partial: give a complete one"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"model {model}: {name} {key} has NaN or infinite values: give an undamaged model")
