"""CLIP text encoders that others changed, folders and files: AdvUnlearn (arXiv 2405.15234), HiRM, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.models.foreign.files import Applied, described, fill, located, read

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# A checkpoint's own name for the encoder before transformers' names; AdvUnlearn's wrapper has each tensor twice, whole
# below text_encoder. and once more by its parts.
PREFIXES = ("", "text_encoder.", "module.", "module.text_encoder.", "cond_stage_model.transformer.", "transformer.")
SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "max_position_embeddings")


def put_text_encoder(pipe: DiffusionPipeline, source: str) -> Applied:
    """Copy a text encoder's weights into the pipeline's first one; returns what the source was.

    A file may hold a part; a folder holds the whole, in itself or in text_encoder/. Raises UserError for what is no
    text encoder, does not fit, or is partial without being meant so.
    """
    path, tail = located(source, "--text_encoder")
    said = f"--text_encoder {source}"
    if tail:
        raise UserError(f"{said}: @{tail} means nothing here: leave it out")
    encoder = pipe.components.get("text_encoder")
    if encoder is None:
        raise UserError(f"{said}: a {type(pipe).__name__} without a text encoder cannot take it")
    if (path / "text_encoder").is_dir():
        path = path / "text_encoder"
    if (path / "config.json").is_file():
        _check_config(path / "config.json", encoder.config, said)
    weights = read(path, "--text_encoder").tensors
    names, prefix = _names(encoder, weights)
    if not names:
        raise UserError(f"{said} is {_other_kind(weights)}: it holds {described(weights, sorted(weights))}")
    own = set(names.values())
    foreign = _foreign(weights, prefix, own)
    if foreign:
        raise UserError(
            f"{said}: {len(foreign)} of its {len(weights)} tensors are none of the base's text encoder: "
            f"{described(weights, foreign)}; give the base that it was made from"
        )
    total = len(encoder.state_dict())
    if path.is_dir() and len(names) < total:
        missing = min(set(encoder.state_dict()) - names.keys())
        raise UserError(
            f"{said}: {total - len(names)} of {total} tensors have no value, such as {missing}: give the whole "
            "encoder, or name the file that holds a part on purpose"
        )
    fill(encoder, weights, names, said)
    kind = "a whole text encoder" if len(names) == total else "a part of a text encoder"
    return Applied(f"{path.name}: {kind}, {len(names)} of {total} tensors", frozenset({"text_encoder"}))


def _names(encoder: Any, weights: dict[str, Tensor]) -> tuple[dict[str, str], str]:
    """Return {the encoder's name: the file's} and the prefix, with or without "text_model.", that finds most."""
    best: dict[str, str] = {}
    found = ""
    for prefix in PREFIXES:
        names = {}
        for name in encoder.state_dict():
            short = name.removeprefix("text_model.")
            for theirs in (f"{prefix}text_model.{short}", prefix + short):
                if theirs in weights:
                    names[name] = theirs
                    break
        if names and len(names) >= len(best):  # of a wrapper that has everything twice, the part with a name
            best, found = names, prefix
    return best, found


def _foreign(weights: dict[str, Tensor], prefix: str, own: set[str]) -> list[str]:
    """Return the tensors that should be the encoder's and are not; positions are numbers 0, 1, 2, ..., not weights."""
    found = []
    for name in sorted(weights):
        if name.startswith(prefix) and name not in own and not name.endswith("position_ids"):
            found.append(name)
    return found


def _check_config(file: Path, config: Any, said: str) -> None:
    """Refuse the folder of an encoder of another shape. Raises UserError."""
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
        theirs = theirs.get("text_config") or theirs
    except (ValueError, AttributeError) as error:
        raise UserError(f"{said}: {file} is damaged ({error}): copy it again") from error
    for name in SHAPE:
        if name in theirs and theirs[name] != getattr(config, name, theirs[name]):
            raise UserError(
                f"{said} has {name} {theirs[name]} where the base has {getattr(config, name)}: give the base that it "
                "was made from"
            )


def _other_kind(weights: dict[str, Tensor]) -> str:
    """Return what a file without an encoder's tensors seems to be, and the next step."""
    if any("lora" in name for name in weights):
        return "an adapter: give it as --adapter"
    if any("attn2" in name or "input_blocks" in name for name in weights):
        return "a UNet: give it as --unet"
    return "no text encoder of this base"
