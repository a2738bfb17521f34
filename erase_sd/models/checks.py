"""Is this folder, and the pipeline loaded from it, a sound text-to-image model of a family that can be erased?

The libraries load much that cannot work: a partial UNet (meta tensors and a warning), a tokenizer folder without
files (a tokenizer of two tokens), NaN weights (whose images are black and so look perfectly erased). Every check
here ends in one UserError sentence that names the bad value and the next step.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from erase_sd.common.errors import UserError
from erase_sd.models.families import FAMILIES, Family, family, modules

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

POINTER = b"version https://git-lfs"  # how the few lines begin that git leaves where git-lfs did not fetch a file
# file, shard or index of one component: model.safetensors, model.fp16-00001-of-00002.safetensors,
# model-00001-of-00002.fp16.safetensors, model.safetensors.index.fp16.json
WEIGHT_FILE = re.compile(
    r"(diffusion_pytorch_model|model)(?:\.(?P<variant>[^.-]+))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<late>[^.]+))?\.safetensors"
    r"(?P<index>\.index(?:\.(?P<indexed>[^.]+))?\.json)?"
)
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
    """Return the layout of a single-file model.

    Refuses what is no .safetensors, since reading a pickle runs its code, and what holds no whole model.
    """
    if Path(model).suffix != ".safetensors":
        raise UserError(f"--model {model} is no .safetensors file: convert it, or give the folder of save_pretrained")
    names = tensor_names(Path(model))
    if foreign := _artefact(names):
        raise UserError(f"--model {model} is {foreign}, no model: give the base model, whose weights it changes")
    if config is None:
        raise UserError(f"--model {model} does not say how it is laid out: give --model_config, a folder or a Hub id")
    return config


def _artefact(names: set[str]) -> str:
    """Return what a file of these tensors is if it is no model but a change to one, else ""."""
    lowered = {name.lower() for name in names}
    if not lowered:
        return "empty"
    if any("lora_" in name or "hada_" in name or name.endswith(".alpha") for name in lowered):
        return "a LoRA"
    if all(".attn2." in name for name in lowered):
        return "a file of cross-attention weights alone, such as ESD and UCE publish"
    if lowered & {"emb_params", "clip_l", "clip_g"} or all(name.startswith("<") for name in lowered):
        return "a textual inversion"
    return ""


def tensor_names(file: Path) -> set[str]:
    """Return the names of a .safetensors file's tensors. Raises UserError for a git-lfs pointer and a damaged file."""
    check_fetched(file)
    try:
        with safe_open(file, framework="pt") as weights:
            return set(weights.keys())
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or incomplete ({error}): copy or download it again") from error


def check_fetched(file: Path) -> None:
    """Refuse the pointer that git leaves where git-lfs did not fetch a file. Raises UserError."""
    with open(file, "rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise UserError(f"{file} is a git-lfs pointer, not the file itself: run git lfs pull where it came from")


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


def check_folder(folder: Path, components: list[str]) -> str | None:
    """Check that every component's folder has its whole weights; return the variant to load, None for the usual files.

    A variant, such as fp16, is loaded where a component has no other files.
    """
    sets: dict[str, WeightFiles] = {}
    for name in components:
        part = folder / name
        if not part.is_dir():
            raise UserError(f"model folder {folder} has no {name}/: copy the whole pipeline, or save it again")
        if not name.startswith(WEIGHTLESS):
            sets[name] = check_weight_files(part)
    variants = {files.variant for files in sets.values() if files.variant}
    if len(variants) > 1:
        names = ", ".join(sorted(variants))
        raise UserError(f"model folder {folder} mixes the variants {names}: keep the files of one")
    variant = variants.pop() if variants else None
    if variant:  # the libraries then take it everywhere
        for name in sets:
            weight_files(folder / name, variant)
    return variant


class WeightFiles(NamedTuple):
    """The files that hold the weights of one component, and the variant that their names say, such as fp16."""

    files: list[Path]
    variant: str | None


def check_weight_files(folder: Path) -> WeightFiles:
    """Return the weights in one component's folder. Raises UserError as `weight_files`, and without a config.json."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: copy it from the base model, or save the pipeline again")
    check_fetched(folder / "config.json")
    return weight_files(folder)


def weight_files(folder: Path, wanted: str | None = None) -> WeightFiles:
    """Return the files that a component is loaded from: the usual ones, or those of its variant.

    `wanted` is a variant that is preferred where it is there. Raises UserError for a folder without weights, with
    several variants and nothing else, with a shard missing, or with a file that is cut short or was never fetched.
    """
    sets: dict[str | None, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if found := WEIGHT_FILE.fullmatch(file.name):
            sets.setdefault(found["variant"] or found["late"] or found["indexed"], []).append(file)
    if not sets and not any(folder.glob("*.bin")):
        raise UserError(f"{folder} has no weight file: copy its .safetensors file, or save the pipeline again")
    if not sets:
        return WeightFiles([], None)
    variant = wanted if wanted in sets else None
    if variant not in sets:
        if len(sets) > 1:
            choices = ", ".join(sorted(filter(None, sets)))
            raise UserError(f"{folder} has the variants {choices} and no file without one: keep the files of one")
        variant = next(iter(sets))
    files = _whole(folder, sets[variant])
    for file in files:
        tensor_names(file)
    return WeightFiles(files, variant)


def _whole(folder: Path, files: list[Path]) -> list[Path]:
    """Return the .safetensors among the files of one set. Raises UserError for one that is missing."""
    shards: list[Path] = []
    whole: list[Path] = []
    for file in files:
        if file.suffix == ".json":
            check_fetched(file)
            named = _indexed(file)
            for name in sorted(named):
                if not (folder / name).is_file():
                    raise UserError(f"{folder} is incomplete: {file.name} names {name}, which is missing: copy it too")
            return sorted(folder / name for name in named)
        (shards if WEIGHT_FILE.fullmatch(file.name)["shard"] else whole).append(file)
    if shards and not whole:
        raise UserError(f"{folder} is incomplete: it has {shards[0].name} and no index of the parts: copy that too")
    return whole


def _indexed(index: Path) -> set[str]:
    """Return the names of the files that an index lists. Raises UserError for one that is damaged."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: copy or download it again") from error


def check_pipeline(pipe: DiffusionPipeline, model: str) -> None:
    """Check that the loaded parts are complete, finite and fit each other."""
    for name, encoder in modules(pipe).items():
        if name.startswith("text_encoder"):
            check_tokenizer(pipe.components[name.replace("text_encoder", "tokenizer")], encoder.config, model)
    check_network(family(pipe), pipe.components, model)
    for name, part in modules(pipe).items():
        check_weights(part, name, model)


def check_text_encoder_files(pipe: DiffusionPipeline, folder: Path, variant: str | None = None) -> None:
    """Check that the files of the text encoders have a value for every tensor.

    transformers fills in random values for tensors that a file lacks and only logs it. Files written before
    transformers 5.6 have the prefix "text_model."; tied tensors, which share their memory, are stored once.
    """
    for part, encoder in modules(pipe).items():
        if not part.startswith("text_encoder"):
            continue
        stored = _stored_names(folder / part, variant)
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


def _stored_names(folder: Path, variant: str | None) -> set[str]:
    """Return the names of all tensors in a component's .safetensors files, without the prefix "text_model."."""
    names: set[str] = set()
    for file in weight_files(folder, variant).files:
        for name in tensor_names(file):
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


def check_network(kind: Family, parts: dict[str, Any], model: str) -> None:
    """Check that the network denoises this VAE's latents and nothing else, under these text encoders' embeddings.

    `parts` are the pipeline's components by name, of which the configurations count.
    """
    config, latent = parts[kind.part].config, kind.patch * parts["vae"].config.latent_channels
    if config.in_channels != latent:
        raise UserError(
            f"model {model}: the {kind.part} takes {config.in_channels} channels and the VAE makes {latent}: "
            "inpainting and other conditioned models cannot be erased, give the text-to-image model behind this one"
        )
    key, theirs, encoders = kind.widths
    width = 0
    for name in encoders:
        width += getattr(parts[name].config, theirs)
    if config[key] != width:
        raise UserError(
            f"model {model}: the {kind.part} expects text {config[key]} wide and the text encoder gives "
            f"{width}: give the {kind.part} and the pipeline of the same base model"
        )


def check_editable(pipe: DiffusionPipeline) -> None:
    """Refuse parts that cannot be edited as they are: compiled, with adapters, offloaded layer by layer, mixed dtypes.

    Raises UserError with the way back.
    """
    for name, part in modules(pipe).items():
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None:
            raise UserError(f"the {name} is compiled: erase from a pipeline that is not, and compile it afterwards")
        for key, tensor in part.named_parameters():
            if ".lora_" in key:
                raise UserError(
                    f"the {name} carries a LoRA ({key}): call pipe.fuse_lora() and pipe.unload_lora_weights(), or "
                    "delete the adapter, and erase from what is left"
                )
            if tensor.is_meta:
                raise UserError(
                    f"the {name} is offloaded layer by layer: call pipe.remove_all_hooks() or load it anew"
                )
    _check_dtypes(modules(pipe))


def _check_dtypes(parts: dict[str, torch.nn.Module]) -> None:
    """Refuse parts that cannot work together: only an autoencoder that its pipeline casts may differ."""
    found: dict[torch.dtype, str] = {}
    for name, part in parts.items():
        if name != "vae" or not part.config.get("force_upcast"):
            found.setdefault(part.dtype, name)
    if len(found) > 1:
        mixed = " and ".join(f"a {name} in {str(dtype).removeprefix('torch.')}" for dtype, name in found.items())
        raise UserError(f"the pipeline has {mixed}: load it in one dtype, such as dtype=torch.float32")


def check_weights(part: torch.nn.Module, name: str, model: str) -> None:
    """Check that no tensor is missing (left on the meta device by a partial file) and that every value is finite."""
    for key, tensor in part.state_dict().items():
        if tensor.is_meta:
            raise UserError(
                f"model {model}: the {name} has no value for {key}, its weight file is partial: give a complete one"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"model {model}: {name} {key} has NaN or infinite values: give an undamaged model")
