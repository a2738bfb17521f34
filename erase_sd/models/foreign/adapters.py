"""LoRA and SPM adapters, added to the weights: W <- W + strength * (alpha / rank) * up @ down.

peft and diffusers call a pair lora_A and lora_B, older diffusers lora.down and lora.up, kohya and SPM lora_down and
lora_up below a module's name with underscores. SPM (Lyu et al., CVPR 2024, arXiv 2312.16145) scales its adapter by how
much a prompt resembles the concept; in the weights it has the strength that it has on the concept itself.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.models.foreign.files import Applied, described, located, read
from erase_sd.models.ldm_names import unet_modules, unet_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HALF = re.compile(r"(?P<module>.+?)(?:\.lora_(?P<letter>[AB])(?:\.[^.]+)?|[._]lora[._](?P<word>down|up))\.weight")
DOWN = {"A", "down"}


@dataclass(kw_only=True)
class FactorPair:
    """The two factors of one module's change: down (rank, in, ...) and up (out, rank, ...)."""

    down: str = ""  # the names of the tensors
    up: str = ""
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterScale:
    """What an adapter's configuration says about alpha where its file has none."""

    alpha: float | None = None
    rooted: bool = False  # rank-stabilised: alpha / sqrt(rank)

    def of(self, pair: FactorPair, rank: int) -> float:
        """Return what up @ down is multiplied with; without any alpha 1."""
        alpha = self.alpha if pair.alpha is None else pair.alpha
        if alpha is None:
            return 1.0
        return alpha / (sqrt(rank) if self.rooted else rank)


def add_adapter(pipe: DiffusionPipeline, source: str) -> Applied:
    """Add an adapter to the weights of the pipeline's networks; returns what it was. "FILE@0.5" takes half of it.

    Raises UserError, with nothing added, for a file that is no adapter, for kinds other than LoRA, and for modules
    that the pipeline does not have.
    """
    path, tail = located(source, "--adapter")
    strength = _strength(source, tail)
    stored = read(path, "--adapter")
    pairs = _pairs(stored.tensors, source)
    scales = _scales(path, stored.metadata, source)
    modules = _modules(pipe)
    unknown = []
    for name in pairs:
        if name not in modules:
            unknown.append(pairs[name].down)
    if unknown:
        raise UserError(
            f"--adapter {source}: {len(unknown)} of its {len(pairs)} modules are none of the base's: "
            f"{described(stored.tensors, unknown)}; give the base that it was made from"
        )
    changes = []
    ranks, parts = set(), Counter()
    for name, pair in pairs.items():
        part, module = modules[name]
        down, up = stored.tensors[pair.down].float(), stored.tensors[pair.up].float()
        if len(down) != up.shape[1] or down[0].numel() * len(up) != module.weight.numel():
            shapes = described(stored.tensors, [pair.down, pair.up])
            raise UserError(
                f"--adapter {source}: {shapes} make no change of a weight {tuple(module.weight.shape)}: give the base "
                "that it was made from"
            )
        ranks.add(len(down))
        parts[part] += 1
        scale = strength * scales.get(part, scales[""]).of(pair, len(down))
        changes.append((module.weight, up, down, scale))
    with torch.no_grad():
        for weight, up, down, scale in changes:
            weight += (scale * (up.flatten(1) @ down.flatten(1))).reshape(weight.shape).to(weight.dtype)
    return Applied(_said(path, pairs, ranks, parts, strength), frozenset(parts))


def _said(path: Path, pairs: dict[str, FactorPair], ranks: set[int], parts: Counter, strength: float) -> str:
    kohya = any(name.startswith("lora_") for name in pairs)
    kind = "LoRA or SPM, kohya's names" if kohya else "LoRA"
    if kohya and ranks == {1}:
        kind = "SPM or LoRA of rank 1, kohya's names, the same for every prompt"
    where = " and ".join(f"{count} modules of the {part}" for part, count in sorted(parts.items(), reverse=True))
    return f"{path.name}: {kind}, rank {', '.join(map(str, sorted(ranks)))}, {where}, strength {strength:g}"


def _strength(source: str, tail: str) -> float:
    try:
        strength = float(tail or 1)
    except ValueError:
        raise UserError(f"--adapter {source}: {tail!r} is no strength: give FILE@0.5, or FILE alone") from None
    if not abs(strength) < 1000:
        raise UserError(f"--adapter {source}: {tail} is no strength: give FILE@0.5, or FILE alone")
    return strength


def _pairs(weights: dict[str, Tensor], source: str) -> dict[str, FactorPair]:
    """Return the pairs by module. Raises UserError for tensors that belong to none."""
    pairs: dict[str, FactorPair] = {}
    alphas: dict[str, float] = {}
    others = []
    for name, x in weights.items():
        half = HALF.fullmatch(name)
        if half:
            pair = pairs.setdefault(half["module"].replace(".processor.", "."), FactorPair())
            if (half["letter"] or half["word"]) in DOWN:
                pair.down = name
            else:
                pair.up = name
        elif name.endswith(".alpha") and x.numel() == 1:
            alphas[name.removesuffix(".alpha")] = float(x)
        else:
            others.append(name)
    if not pairs:
        held = described(weights, sorted(weights))
        raise UserError(
            f"--adapter {source} is no LoRA: it holds {held}; whole weights are for --unet, --text_encoder"
        )
    others += [pair.down or pair.up for pair in pairs.values() if not (pair.down and pair.up)]
    if others:
        raise UserError(
            f"--adapter {source} is no plain LoRA, the only kind that is read: {described(weights, sorted(others))}"
        )
    for module in alphas.keys() & pairs.keys():
        pairs[module].alpha = alphas[module]
    return pairs


def _scales(path: Path, metadata: dict[str, str], source: str) -> dict[str, AdapterScale]:
    """Return alpha by component, "" for all others, from peft's adapter_config.json or diffusers' header.

    Raises UserError for a configuration that is damaged or of another kind.
    """
    config = path / "adapter_config.json" if path.is_dir() else path.parent / "adapter_config.json"
    try:
        if config.is_file():
            return {"": _scale(json.loads(config.read_text(encoding="utf-8")), source)}
        header = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        by_part: dict[str, dict[str, Any]] = {}
        for key, value in header.items():
            part, _, field = key.partition(".")
            by_part.setdefault(part, {})[field] = value
        return {"": AdapterScale()} | {part: _scale(values, source) for part, values in by_part.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--adapter {source}: its configuration is damaged ({error}): copy it again") from error


def _scale(values: dict[str, Any], source: str) -> AdapterScale:
    if values.get("use_dora") or values.get("peft_type", "LORA") != "LORA":
        kind = "DoRA" if values.get("use_dora") else values["peft_type"]
        raise UserError(f"--adapter {source} is a {kind}, and only LoRA is read: merge it into the UNet first")
    if values.get("alpha_pattern"):
        raise UserError(f"--adapter {source} has an alpha of its own for some modules: merge it into the UNet first")
    alpha = values.get("lora_alpha")
    return AdapterScale(alpha=None if alpha is None else float(alpha), rooted=bool(values.get("use_rslora")))


def _modules(pipe: DiffusionPipeline) -> dict[str, tuple[str, nn.Module]]:
    """Return (component, module) by every name that adapters have for it."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for part in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        network = pipe.components.get(part)
        if network is None:
            continue
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                for alias in _aliases(part, name):
                    found[alias] = (part, module)
    if pipe.components.get("unet") is not None:
        found |= _ldm_aliases(pipe.unet)
    return found


def _aliases(part: str, name: str) -> list[str]:
    """Return the names of one module: diffusers' and peft's with dots, kohya's with underscores."""
    if not part.startswith("text_encoder"):
        short = name.removesuffix(".0") if name.endswith("to_out.0") else name  # before peft, it was to_out
        kohya = "lora_unet_" + name.replace(".", "_")
        return [name, short, f"{part}.{name}", f"{part}.{short}", f"base_model.model.{name}", kohya]
    name = name.removeprefix("text_model.")
    flat = "text_model_" + name.replace(".", "_")
    numbers = ("", "1") if part == "text_encoder" else ("2",)
    return [f"{part}.{name}", f"{part}.text_model.{name}", *(f"lora_te{number}_{flat}" for number in numbers)]


def _ldm_aliases(unet: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return kohya's names for XL, which count the blocks as LDM does; {} for a UNet that LDM does not have."""
    found: dict[str, tuple[str, nn.Module]] = {}
    try:
        names = unet_modules(unet.config)
        for name, module in unet.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                ldm = unet_name(f"{name}.weight", names).removesuffix(".weight")
                found["lora_unet_" + ldm.replace(".", "_")] = ("unet", module)
    except UserError:
        return {}
    return found
