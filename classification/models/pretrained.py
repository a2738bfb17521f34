"""Weights from elsewhere: torchvision's files for our own networks, and whole classifiers of `transformers`."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from erase_sd.common.errors import UserError

HUB = {"resnet34": "timm/resnet34.tv_in1k"}  # torchvision's resnet34-b627a593 (IMAGENET1K_V1), as safetensors


def load_weights(model: nn.Module, name: str, source: str) -> None:
    """Fill `model`, one of our own, in place from the Hub ("hub") or from a local .safetensors or .pth file.

    The model keeps its own `fc` when the file's has another number of classes, and its own `normalize` when the file
    has none. Raises UserError for a source that is missing, damaged or of another network.
    """
    state = read_weights(_download(name) if source == "hub" else Path(source))
    own = model.state_dict()
    for key, tensor in own.items():
        if key.startswith("normalize.") or key.endswith("num_batches_tracked"):
            state.setdefault(key, tensor)
    if "fc.weight" in state and len(state["fc.weight"]) != len(own["fc.weight"]):
        state["fc.weight"], state["fc.bias"] = own["fc.weight"], own["fc.bias"]
    for key in sorted(own.keys() | state.keys()):
        ours, theirs = _shape(own, key), _shape(state, key)
        if ours != theirs:
            raise UserError(
                f"--weights {source} is not a {name}: {key} is {theirs} there and {ours} in the model; "
                "name another file"
            )
    model.load_state_dict(state)


def _shape(state: dict[str, Tensor], key: str) -> tuple[int, ...] | str:
    return tuple(state[key].shape) if key in state else "absent"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a .pth one that holds nothing else, or has them in state_dict.

    Raises UserError for a file that is missing, damaged or needs to execute code.
    """
    if not path.is_file():
        raise UserError(f"--weights {path} does not exist: name a .safetensors or .pth file, or hub")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"--weights {path} cannot be read as weights alone: save it as safetensors ({error})"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise UserError(f"--weights {path} holds more than tensors, or none: save the model's state_dict alone")
    return dict(state)


def _download(name: str) -> Path:
    """Return the file of the Hub's weights for a model, downloaded once."""
    from huggingface_hub import hf_hub_download

    if name not in HUB:
        raise UserError(f"--weights hub exists for {', '.join(HUB)} only, not for {name}: name a file or leave it out")
    try:
        return Path(hf_hub_download(HUB[name], "model.safetensors"))
    except OSError as error:  # all of the Hub's own errors are
        raise UserError(f"--weights hub: cannot get {HUB[name]}, give its file instead ({error})") from error


class FromTransformers(nn.Module):
    """An image classifier of `transformers` behind the interface of ours: images in [0, 1] in, logits (B, K) out.

    Images are enlarged or reduced to the size its position embeddings were made for, where its configuration has one.
    """

    def __init__(self, model: nn.Module, normalize: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        size = getattr(self.model.config, "image_size", None) or tuple(x.shape[-2:])
        if isinstance(size, int):
            size = (size, size)
        if tuple(x.shape[-2:]) != tuple(size):
            x = F.interpolate(x, tuple(size), mode="bilinear", antialias=True)
        return self.model(pixel_values=self.normalize(x)).logits


def transformers_model(name: str, classes: int, channels: int, normalize: nn.Module, empty: bool = False) -> nn.Module:
    """Return the classifier of a folder or Hub id, in float32 and training mode; a head of another size is drawn anew.

    With `empty` only its configuration is read, and all of its weights are drawn. Only safetensors are read and no
    code of the model's own is run. Raises UserError for a model that is missing, of another kind or number of
    channels, or that lacks more than its head.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        if empty:
            config = AutoConfig.from_pretrained(name, num_labels=classes)
            return FromTransformers(AutoModelForImageClassification.from_config(config).float(), normalize).train()
        model, report = AutoModelForImageClassification.from_pretrained(
            name,
            num_labels=classes,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:  # OSError: the Hub's own; ValueError: no classifier
        raise UserError(f"cannot load {name} as an image classifier: name another model ({error})") from error
    theirs = getattr(model.config, "num_channels", channels)
    if theirs != channels:
        raise UserError(f"{name} takes images of {theirs} channels, not {channels}: name another model")
    drawn = set(report["missing_keys"])  # names of the tensors that were initialised, not loaded
    for entry in report["mismatched_keys"]:
        drawn.add(entry[0])
    state = model.state_dict()
    for key in sorted(drawn):
        if tuple(state[key].shape[:1]) != (classes,):  # a head has one row for each class
            raise UserError(f"{name} lacks weights besides its head, such as {key}: name a complete model")
    return FromTransformers(model, normalize).train()
