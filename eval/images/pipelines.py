"""Any diffusers text-to-image pipeline, with the network of an erased run in it and the scheduler of a protocol."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest
from erase_sd.models.checks import check_place, explained
from erase_sd.models.families import FAMILIES
from erase_sd.models.foreign import Artefacts, identity, is_single_file, put
from erase_sd.models.pipeline import load as load_erasable
from erase_sd.models.pipeline import load_network
from erase_sd.pocket import FOLDER as POCKET

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",  # the paper's
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# What latent diffusion models need and these classes do not have as defaults: they were written for pixels in [-1, 1],
# and would clip the latents of a model whose own scheduler (Euler, DPM++, UniPC) has no such keys to grey.
LATENT_DIFFUSION = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}
OF_PIXELS = ("ddim", "ddpm", "pndm")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def place(model: str) -> str:
    """Return the folder or Hub id that a model's name stands for: "pocket" is the embedded one."""
    return str(POCKET) if model == "pocket" else model


def load(
    model: str,
    *,
    unet: str | None,
    transformer: str | None,
    dtype: str,
    scheduler: str | None,
    text_encoder: str | None = None,
    adapter: tuple[str, ...] = (),
) -> DiffusionPipeline:
    """Load the pipeline, checked, on the CPU and without a safety checker, which would paint images black.

    `unet` or `transformer` names a run folder, the network's own folder, or a Hub id; `unet` may be a file of another
    project as well, as `text_encoder` and `adapter` are. What such a file is goes to stderr. Raises UserError for a
    model that cannot be loaded, and for a network, a scheduler or a file that does not fit it.
    """
    from diffusers import DiffusionPipeline

    model = place(model)
    check_place(model, "--model")
    with explained("--model", model):
        index = DiffusionPipeline.load_config(model)
    _check_networks(index, model, unet, transformer)
    artefacts = _artefacts(unet, text_encoder, adapter)
    unet = None if artefacts.unet else unet
    if index.get("_class_name") in FAMILIES:
        pipe = load_erasable(model, unet=unet, transformer=transformer, dtype=DTYPES[dtype])
    else:
        pipe = _other(model, index, unet, transformer, DTYPES[dtype])
    for applied in put(pipe, artefacts):
        if os.environ.get("RANK", "0") == "0":
            print(applied.line, file=sys.stderr)
    if scheduler is not None:
        pipe.scheduler = _scheduler(scheduler, pipe.scheduler, type(pipe).__name__)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _artefacts(unet: str | None, text_encoder: str | None, adapter: tuple[str, ...]) -> Artefacts:
    """Return what is put into the loaded pipeline: a UNet that diffusers loads itself is none of it.

    A run that started from another text encoder brings it along.
    """
    own = Path(unet or "") / "text_encoder"
    if unet and not text_encoder and own.is_dir() and (own.parent / "run.json").is_file():
        text_encoder = str(own)
    return Artefacts(unet if is_single_file(unet) else None, text_encoder, adapter)


def _check_networks(index: dict[str, Any], model: str, unet: str | None, transformer: str | None) -> None:
    for option, source in (("unet", unet), ("transformer", transformer)):
        if source and not index.get(option, [None])[0]:
            raise UserError(f"--{option} {source}: model {model} is a {index.get('_class_name')} without a {option}")


def _other(
    model: str, index: dict[str, Any], unet: str | None, transformer: str | None, dtype: torch.dtype
) -> DiffusionPipeline:
    """Load a pipeline of a family that can be sampled, though not erased."""
    from diffusers import AutoPipelineForText2Image

    parts: dict[str, Any] = {name: None for name, kind in index.items() if kind == [None, None]}  # left out on purpose
    if unet:
        parts["unet"] = load_network(unet, "unet", dtype)
    if transformer:
        parts["transformer"] = load_network(transformer, "transformer", dtype)
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    with explained("--model", model):
        return AutoPipelineForText2Image.from_pretrained(model, dtype=dtype, **parts)


def _scheduler(name: str, own: SchedulerMixin, pipeline: str) -> SchedulerMixin:
    """Return the scheduler of this name for a pipeline whose own scheduler is `own`."""
    import diffusers

    if name == "lms" and importlib.util.find_spec("scipy") is None:
        raise UserError("--scheduler lms needs scipy: pip install erase-sd[eval]")
    if "Flow" in type(own).__name__:
        raise UserError(f"--scheduler {name} is for noise models, {pipeline} is a flow model: leave it out")
    kind = getattr(diffusers, SCHEDULERS[name])
    given = {}
    if name in OF_PIXELS and type(own) is not kind:
        stored = own.config.keys() - set(own.config.get("_use_default_values", ()))
        for key in LATENT_DIFFUSION.keys() & inspect.signature(kind).parameters.keys() - stored:
            given[key] = LATENT_DIFFUSION[key]
    return kind.from_config(own.config, **given)


def origin(
    model: str,
    *,
    unet: str | None,
    transformer: str | None,
    scheduler: str | None,
    text_encoder: str | None = None,
    adapter: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return what identifies a pipeline beside its options, without loading its weights.

    {"sampler": {"class", "config"}, "model_revision", "model_sha256", "weights_revision", "weights_sha256"}: revisions
    are commits of a Hub id, hashes are of a local folder. The sampler's configuration is the stored one;
    StableDiffusionPipeline itself turns off clip_sample and sets steps_offset to 1 where an old file has other values.
    Other projects' files add "unet_sha256", "text_encoder_sha256" and "adapter_sha256".
    Raises UserError for a model, network or scheduler that cannot be had.
    """
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    check_place(place(model), "--model")
    with explained("--model", model):
        index, model_revision = DiffusionPipeline.load_config(place(model), return_commit_hash=True)
    _check_networks(index, model, unet, transformer)
    artefacts = _artefacts(unet, text_encoder, adapter)
    hashes = identity(artefacts)
    unet = None if artefacts.unet else unet
    weights_revision = None
    for part, source in (("unet", unet), ("transformer", transformer)):
        if source:
            check_place(source, f"--{part}")
        if source and not Path(source).is_dir():
            with explained(f"--{part}", source):
                read_config = UNet2DConditionModel.load_config  # of any class: nothing but the file is read
                _, weights_revision = read_config(source, subfolder=part, return_commit_hash=True)
    return {
        "sampler": _sampler(place(model), index, scheduler),
        "model_revision": model_revision,
        "model_sha256": weights_digest(model),
        "weights_revision": weights_revision,
        "weights_sha256": weights_digest(unet or transformer),
        **hashes,
    }


def _sampler(model: str, index: dict[str, Any], scheduler: str | None) -> dict[str, Any] | None:
    """Return class and configuration of the scheduler; None for a pipeline without one of diffusers'."""
    import diffusers

    library, name = index.get("scheduler") or (None, None)
    if library != "diffusers":
        return None
    with explained("--model", model):
        used = getattr(diffusers, name).from_pretrained(model, subfolder="scheduler")
    if scheduler is not None:
        used = _scheduler(scheduler, used, index["_class_name"])
    config = {}
    for key, value in used.config.items():
        if not key.startswith("_"):
            config[key] = value
    return {"class": type(used).__name__, "config": config}


def weights_digest(source: str | None) -> str | None:
    """Return the hash of all weight files of a local model or network, None for a Hub id or nothing.

    The files are hashed as they are: nothing is loaded.
    """
    if source and is_single_file(source):
        return identity(Artefacts(unet=source))["unet_sha256"]
    folder = Path(place(source)) if source else None
    if folder is None or not folder.is_dir():
        return None
    hashes = []
    for file in sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("*.bin")):
        if "checkpoints" not in file.parts:
            hashes.append([str(file.relative_to(folder)), file_digest(file)])
    return digest(hashes)
