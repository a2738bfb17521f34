"""UNets from single files: whole or a part, by diffusers' names or LDM's, with or without an averaged copy (EMA)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.models import guidance
from erase_sd.models.foreign.files import SUFFIXES, Applied, described, fill, located, read
from erase_sd.models.ldm_names import unet_modules, unet_name
from erase_sd.models.pipeline import load_network

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DIFFUSERS_PREFIXES = ("", "unet.", "module.", "model.", "unet.module.", "module.unet.")
LDM_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "", "module.")
EMA_PREFIX = "model_ema.diffusion_model"


class NamedTensors(NamedTuple):
    """A way in which a file may name a UNet's tensors."""

    name: str
    prefix: str
    names: dict[str, str]  # the UNet's own name -> the file's, of those that the file has


def is_single_file(source: str | None) -> bool:
    """Return whether a network's source was meant as one file, also with "@ema" behind it, and not as a folder."""
    if not source or Path(source).is_dir():
        return False
    return Path(source).is_file() or Path(source.rpartition("@")[0] or source).suffix in SUFFIXES


def put_network(pipe: DiffusionPipeline, source: str) -> Applied:
    """Copy a UNet into the pipeline's: a file, a folder or a Hub id. "FILE@ema" takes a file's averaged copy.

    A file that holds both is read without it, as Stable Diffusion's own loaders do. Raises UserError for what is no
    UNet or does not fit.
    """
    network = pipe.components.get("unet")
    if network is None:
        raise UserError(f"--unet {source}: a {type(pipe).__name__} has no UNet, leave it out")
    if not is_single_file(source):
        return _put_folder(pipe, source)
    path, tail = located(source, "--unet")
    if tail not in ("", "ema"):
        raise UserError(f"--unet {source}: @{tail} is unknown, only FILE@ema is, for the averaged copy")
    weights, _, averaged = read(path, "--unet", ema=tail == "ema")
    layout = _layout(network, weights, ema=tail == "ema")
    said = f"--unet {source}"
    if tail and not averaged and layout.prefix != EMA_PREFIX:
        raise UserError(f"{said}: {path.name} keeps no averaged copy: leave @ema out")
    if not layout.names:
        raise UserError(f"{said} is {_other_kind(weights)}: it holds {described(weights, sorted(weights))}")
    own = set(layout.names.values())
    foreign = [name for name in sorted(weights) if name.startswith(layout.prefix) and name not in own]
    if foreign:
        raise UserError(
            f"{said}: {len(foreign)} of its {len(weights)} tensors are none of the base's UNet: "
            f"{described(weights, foreign)}; give the base that it was made from"
        )
    total = fill(network, weights, layout.names, said)
    line = f"{path.name}: {_called(set(layout.names), total)}, {len(own)} of {total} tensors of the UNet{layout.name}"
    rest = [name for name in weights if name not in own]
    if any(name.startswith(EMA_PREFIX) for name in rest):
        line += f"; its averaged copy is left alone ({path}@ema takes it)"
    elif rest:
        line += f"; {len(rest)} other tensors are left alone"
    return Applied(line, frozenset({"unet"}))


def _put_folder(pipe: DiffusionPipeline, source: str) -> Applied:
    """Copy a network that diffusers loads, with the guidance that it carries."""
    network = load_network(source, "unet", pipe.unet.dtype)
    weights = network.state_dict()
    names = {name: name for name in weights}
    if unlike := sorted(names.keys() ^ pipe.unet.state_dict().keys()):
        raise UserError(f"--unet {source} and the base differ in {unlike[0]}: give the base that it was made from")
    total = fill(pipe.unet, weights, names, f"--unet {source}")
    guidance.copy(network, pipe.unet)
    return Applied(f"{source}: a whole UNet, {total} of {total} tensors of the UNet", frozenset({"unet"}))


def _layout(network: nn.Module, weights: dict[str, Tensor], ema: bool) -> NamedTensors:
    """Return the layout that explains most of the file's tensors."""
    own = list(network.state_dict())
    found = [] if ema and _has_ema(weights) else [_named(own, weights, "", own, DIFFUSERS_PREFIXES)]
    try:
        modules = unet_modules(network.config)
        ldm = [unet_name(name, modules) for name in own]
    except UserError:  # a UNet that LDM has no names for: only diffusers' are left
        return found[0] if found else NamedTensors("", "", {})
    if found:
        found.append(_named(own, weights, ", LDM layout", ldm, LDM_PREFIXES))
    averaged = [name.replace(".", "") for name in ldm]
    if ema or not any(layout.names for layout in found):
        found.append(_named(own, weights, ", LDM layout, averaged (EMA)", averaged, (EMA_PREFIX,)))
    return max(found, key=lambda layout: len(layout.names))


def _has_ema(weights: dict[str, Tensor]) -> bool:
    return any(name.startswith(EMA_PREFIX) for name in weights)


def _named(own: list[str], weights: dict[str, Tensor], name: str, theirs: list[str], prefixes: tuple) -> NamedTensors:
    """Return the layout of these names under the prefix that finds most of them."""
    best = NamedTensors(name, prefixes[0], {})
    for prefix in prefixes:
        names = {}
        for ours, other in zip(own, theirs, strict=True):
            if prefix + other in weights:
                names[ours] = prefix + other
        if len(names) > len(best.names):
            best = NamedTensors(name, prefix, names)
    return best


def _called(names: set[str], total: int) -> str:
    """Return what publishes a UNet's tensors of these names."""
    if len(names) == total:
        return "a whole UNet"
    cross = {name for name in names if ".attn2." in name}
    if cross == names:
        values = all(name.endswith(("to_k.weight", "to_v.weight")) for name in names)
        return "UCE" if values else "ESD"
    return "a part of a UNet" if cross else "ESD without cross-attention"


def _other_kind(weights: dict[str, Tensor]) -> str:
    """Return what a file without a UNet's tensors seems to be, and the next step."""
    if any("lora" in name or name.endswith(".alpha") for name in weights):
        return "an adapter: give it as --adapter"
    if any("self_attn.q_proj" in name for name in weights):
        return "a text encoder: give it as --text_encoder"
    return "no UNet of this base"
