"""A pipeline folder of diffusers: the base's components with the erased network, for `from_pretrained(OUT)`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from erase_sd.common.files import new_folder
from erase_sd.exports.base import DTYPES, Erased, ExportSettings, cast

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Where and how a component was loaded: a path of the user's disk, and switches that are not the next user's.
PRIVATE = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


def write_pipeline(erased: Erased, output: Path, settings: ExportSettings) -> list[str]:
    """Write the folder `output`, whole or not at all. fp16 weights are the variant "fp16", alone or not."""
    with new_folder(output) as temporary:
        save_pipeline(erased.pipe, temporary, settings)
    return [f"{output}: a pipeline folder", "", loading(erased.pipe, str(output), settings)]


def loading(pipe: DiffusionPipeline, source: str, settings: ExportSettings) -> str:
    """Return Python that loads what `save_pipeline` wrote, from a folder or from the Hub."""
    kind = type(pipe).__name__
    optional = {*pipe._optional_components}
    lacking = [name for name, part in pipe.components.items() if part is None and name not in optional]
    more = "".join(f", {name}=None" for name in lacking)  # Stable Diffusion 3 without T5 does not load otherwise
    more += ", dtype=torch.float32" if "fp32" in settings.dtype else ', variant="fp16", dtype=torch.float16'
    return f"import torch\nfrom diffusers import {kind}\n\npipe = {kind}.from_pretrained({source!r}{more})"


def save_pipeline(pipe: DiffusionPipeline, folder: Path, settings: ExportSettings) -> None:
    """Write every component and model_index.json into an existing folder, safetensors only and without private paths.

    Raises UserError for a weight that is not finite in a wanted type.
    """
    pipe.save_config(str(folder))
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            for dtype in settings.dtype:
                _save_weights(component, folder / name, dtype, settings.max_shard_size)
        elif component is not None:
            component.save_pretrained(str(folder / name))
            _write_clip_vocabulary(folder / name)
    for path in folder.rglob("*.json"):
        _scrub(path)


def _save_weights(component: nn.Module, folder: Path, dtype: str, max_shard_size: str) -> None:
    """Write one component as its own library loads it."""
    variant = None if dtype == "fp32" else dtype
    weights = cast(component.state_dict(), DTYPES[dtype], folder.name)
    how = {"variant": variant, "max_shard_size": max_shard_size}
    if hasattr(component, "from_config"):  # of diffusers
        with torch.device("meta"):
            blank = type(component).from_config(component.config)
        blank.load_state_dict(weights, assign=True)
        blank.save_pretrained(str(folder), **how)
    else:
        component.save_pretrained(str(folder), state_dict=_text_encoder_names(component, weights), **how)


def _text_encoder_names(encoder: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP's text model under the prefix "text_model." that every file and every release of transformers knows.

    transformers 5.6 dropped it in memory; releases before that read a file without it as random weights, in silence.
    """
    if type(encoder).__name__ != "CLIPTextModel":
        return weights
    return {"text_model." + name.removeprefix("text_model."): x for name, x in weights.items()}


def _write_clip_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt beside tokenizer.json: transformers 5 no longer does, releases before 5 ask."""
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))["model"] if path.is_file() else {}
    if model.get("type") != "BPE":
        return
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _scrub(path: Path) -> None:
    """Drop what a component's configuration says about how it was loaded here."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(values, dict) and any(name in values for name in PRIVATE):
        kept: dict[str, Any] = {name: value for name, value in values.items() if name not in PRIVATE}
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
