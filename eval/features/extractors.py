"""Networks that turn images into feature vectors, by name, with their preprocessing done here by PIL and torch.

    clip:ID_OR_FOLDER      transformers' CLIP: projected image embeddings, and text embeddings
    dinov2:ID_OR_FOLDER    transformers' DINOv2: the normalised CLS token
    torchscript:FILE       a TorchScript module on bytes in [0, 255], such as StyleGAN's inception-2015-12-05.pt
    pocket                 the pooled features of the pocket world's oracle

Nothing imports torchvision. Weights are safetensors, or what torch loads as weights only; a TorchScript file is the
user's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest
from erase_sd.pocket import oracle

NAMES = "clip:ID_OR_FOLDER, dinov2:ID_OR_FOLDER, torchscript:FILE or pocket"


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """An open network; `key` stands for all that its features depend on."""

    name: str  # as it was asked for
    key: str
    prepare: Callable[[Image.Image], Tensor]  # RGB image -> (3, H, W)
    images: Callable[[Tensor], Tensor]  # (B, 3, H, W) -> (B, D)
    texts: Callable[[list[str]], Tensor] | None = None  # B sentences -> (B, D)


def load(name: str) -> Extractor:
    """Open the extractor of this name. Raises UserError for an unknown one, and for a model that cannot be loaded."""
    kind, _, source = name.partition(":")
    if name == "pocket":
        return _pocket()
    if kind not in _KINDS or not source:
        raise UserError(f"--features {name} is none of {NAMES}")
    return _KINDS[kind](name, source)


def _pocket() -> Extractor:
    network = oracle.load()
    network.heads = nn.ModuleDict({"pooled": nn.Identity()})  # forward then answers what the heads would have seen
    return Extractor(
        name="pocket",
        key=digest(["pocket", file_digest(oracle.WEIGHTS)]),
        prepare=lambda image: oracle.to_tensor([image])[0],
        images=lambda x: network(x)["pooled"],
    )


def _clip(name: str, source: str) -> Extractor:
    from transformers import AutoTokenizer, CLIPModel

    with _explained(name):
        how = _preprocessing(source)
    model, key = _pretrained(CLIPModel, name, source)
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
    config = model.config.text_config
    if len(tokenizer) != config.vocab_size:  # transformers makes an empty tokenizer of a folder without its files
        text = f"--features {name}: the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}"
        raise UserError(f"{text}: copy the tokenizer's files from the base model")
    longest = config.max_position_embeddings

    def texts(sentences: list[str]) -> Tensor:
        tokens = tokenizer(sentences, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return model.get_text_features(
            input_ids=tokens.input_ids.to(model.device), attention_mask=tokens.attention_mask.to(model.device)
        ).pooler_output

    return Extractor(
        name=name,
        key=digest(["clip", key, how]),
        prepare=partial(_prepared, how=how),
        images=lambda x: model.get_image_features(x.to(model.device)).pooler_output,
        texts=texts,
    )


def _dinov2(name: str, source: str) -> Extractor:
    from transformers import Dinov2Model

    with _explained(name):
        how = _preprocessing(source)
    model, key = _pretrained(Dinov2Model, name, source)
    return Extractor(
        name=name,
        key=digest(["dinov2", key, how]),
        prepare=partial(_prepared, how=how),
        images=lambda x: model(x.to(model.device)).pooler_output,
    )


def _torchscript(name: str, source: str) -> Extractor:
    """Open a module that resizes by itself, as StyleGAN's does; `return_features` is passed where forward knows it."""
    if not Path(source).is_file():
        raise UserError(f"--features {name}: there is no file {source}: give the path of a TorchScript module")
    with _explained(name):
        module = torch.jit.load(source, map_location=_device()).eval()
    options = {}
    for argument in module.forward.schema.arguments:
        if argument.name == "return_features":
            options["return_features"] = True

    def images(x: Tensor) -> Tensor:
        try:
            return module(x.to(_device()), **options).flatten(1)
        except RuntimeError as error:  # what TorchScript raises for any fault inside
            reason = shorten(str(error).strip().splitlines()[-1], 160, placeholder=" ...").rstrip(". ")
            raise UserError(
                f"--features {name} makes no features of bytes (B, 3, H, W) in [0, 255] ({reason}): give a module "
                "that does, such as NVIDIA's inception-2015-12-05.pt"
            ) from error

    return Extractor(
        name=name,
        key=digest(["torchscript", file_digest(source), sorted(options)]),
        prepare=lambda image: torch.from_numpy(np.array(image)).movedim(-1, 0),
        images=images,
    )


_KINDS = {"clip": _clip, "dinov2": _dinov2, "torchscript": _torchscript}


def _pretrained(cls: Any, name: str, source: str) -> tuple[Any, str]:
    """Return the model in evaluation mode and the hash of its weights.

    Raises UserError for weights that a file lacks: transformers invents them.
    """
    with _explained(name):
        model, info = cls.from_pretrained(source, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(
            f"--features {name} has no value for {min(info['missing_keys'])}: give a complete {cls.__name__}"
        )
    model = model.eval().requires_grad_(False)
    sha256 = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        sha256.update(key.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return model.to(_device()), sha256.hexdigest()


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the libraries raise while loading into one sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = shorten(str(error), 200, placeholder=" ...").rstrip(". ")
        raise UserError(f"--features {name} cannot be loaded ({reason}): give a local copy, one of {NAMES}") from error


FILES = ("preprocessor_config.json", "processor_config.json")  # the second is what a CLIPProcessor writes


def _prepared(image: Image.Image, how: dict[str, Any]) -> Tensor:
    """Return (3, H, W), resized by the shorter side or to a fixed size, cut from the middle, standardised.

    The numbers are those of transformers' own image processors on PIL.
    """
    size, crop = how["size"], how["crop"]
    if isinstance(size, int):
        short = min(image.size)
        size = [int(size * side / short) for side in reversed(image.size)]
    image = image.resize((size[1], size[0]), Image.Resampling(how["resample"]))
    if crop:
        top, left = (image.height - crop[0]) // 2, (image.width - crop[1]) // 2
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    x = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
    mean = torch.tensor(how["mean"])[:, None, None]
    std = torch.tensor(how["std"])[:, None, None]
    return (x - mean) / std


def _preprocessing(source: str) -> dict[str, Any]:
    """Read size, crop (pixels), mean, std and resample from the model's own file.

    Raises UserError where that says nothing of them, and what transformers raises for a model that cannot be had.
    """
    from transformers.utils import cached_file

    cached_file(source, "config.json")  # raises where there is no such model; the files below may be missing
    stored: dict[str, Any] = {}
    for name in FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            stored = content.get("image_processor", content)
            break
    absent = {"size", "image_mean", "image_std"} - stored.keys()
    if absent:
        raise UserError(f"--features: {FILES[0]} of {source} says nothing of {min(absent)}: add that file")
    return {
        "size": _pixels(stored["size"]),
        "crop": _pair(stored["crop_size"]) if stored.get("do_center_crop", "crop_size" in stored) else None,
        "mean": stored["image_mean"],
        "std": stored["image_std"],
        "resample": stored.get("resample", Image.Resampling.BICUBIC.value),
    }


def _pixels(size: int | dict[str, int]) -> int | list[int]:
    """Return the length of the shorter side, or [height, width]."""
    if isinstance(size, int):
        return size
    if "shortest_edge" in size:
        return size["shortest_edge"]
    return _pair(size)


def _pair(size: int | dict[str, int]) -> list[int]:
    """Return [height, width]."""
    if isinstance(size, int):
        return [size, size]
    return [size["height"], size["width"]]
