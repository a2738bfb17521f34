"""Low-rank adapters of the change: for every Linear and Conv2d weight, delta = W_erased - W_base cut off at a rank.

    delta (out, in k k) = U S V^T       up = U_r S_r^1/2 (out, r)      down = S_r^-1/2 U_r^T delta (r, in k k)

The best approximation of that rank (Eckart and Young 1936), and at full rank the change itself. Norms, biases and
embeddings have no place in a LoRA. What an adapter keeps is said in shares of the squared change of all weights
(energy), as the error of the network's output, and, where somebody can judge the pictures, in scores. A scattered
change is not low-rank: rank 64 keeps a third of it, and such an adapter is not the erased model.

    rank-R/pytorch_lora_weights.safetensors     diffusers and peft
    rank-R/<name>-rank-R.safetensors            kohya's layout: ComfyUI and A1111; UNets only
    lora.json                                   what each rank keeps
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.common.files import new_folder
from erase_sd.common.rng import generator
from erase_sd.exports.base import DTYPES, Erased, ExportSettings, cast, table, with_network
from erase_sd.exports.ldm import unet_modules, unet_name
from erase_sd.models.families import family, resolution
from erase_sd.models.pipeline import encode

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
REPORT = "lora.json"
TIMESTEP = 500  # at which the networks' outputs are compared


class Factors(NamedTuple):
    """One weight's change as a product, its strongest directions first."""

    up: Tensor  # (out, r)
    down: Tensor  # (r, in, ...), shaped as the weight
    energy: Tensor  # (full rank,), float64: squared singular values, descending


class Change(NamedTuple):
    """The change of a network: what adapters can hold, module by module, and the energy of all of it."""

    factors: dict[str, Factors]
    total: float

    def kept(self, rank: int) -> float:
        """Return the share of the energy that adapters of this rank keep, in [0, 1]."""
        return float(sum(f.energy[:rank].sum() for f in self.factors.values())) / self.total

    def rank_for(self, share: float) -> int | None:
        """Return the lowest rank that keeps this share, None if no rank does."""
        longest = max((len(f.energy) for f in self.factors.values()), default=0)
        spectrum = torch.zeros(longest, dtype=torch.float64)
        for f in self.factors.values():
            spectrum[: len(f.energy)] += f.energy
        enough = (spectrum.cumsum(0) >= share * self.total * (1 - 1e-12)).nonzero().flatten()
        return int(enough[0]) + 1 if len(enough) else None


def write_lora(erased: Erased, output: Path, settings: ExportSettings) -> list[str]:
    """Write the folder `output`, an adapter per rank. Raises UserError for one that is not the erased model."""
    change = factorise(erased.original, erased.network, max(settings.rank))
    for rank in settings.rank:
        _check_energy(change, rank, settings)
    ranks: dict[str, dict[str, Any]] = {}
    with new_folder(output) as temporary:
        for rank in settings.rank:
            layers = adapters(change, rank, DTYPES[settings.dtype[0]])
            kept = change.kept(rank)
            partial = kept < settings.min_energy
            ranks[str(rank)] = {"kept_energy": kept, "partial": partial} | _measured(erased, layers)
            facts = {"rank": str(rank), "kept_energy": f"{kept:.6f}", "partial": str(partial).lower()}
            _save(erased, layers, temporary / f"rank-{rank}", facts)
        report = {"min_energy": settings.min_energy, "modules": len(change.factors), "ranks": ranks}
        (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    use = f'pipe.load_lora_weights("{output}/rank-{settings.rank[0]}")  # with peft: pip install peft'
    return [f"{output}: an adapter per rank, for diffusers and for ComfyUI", "", *_summary(ranks), "", use]


def factorise(base: nn.Module, after: nn.Module, rank: int) -> Change:
    """Return the change from one network to another, its factors cut off at `rank`. UserError if there is none."""
    new = dict(after.named_parameters())
    modules = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    factors, total = {}, 0.0
    for name, old in base.named_parameters():
        delta = new[name].detach().double() - old.detach().double()
        energy = float(delta.square().sum())
        total += energy
        module, _, kind = name.rpartition(".")
        if energy and kind == "weight" and module in modules and getattr(modules[module], "groups", 1) == 1:
            factors[module] = low_rank(delta, rank)
    if total == 0:
        raise UserError("the erased network is the base's: there is no change to make an adapter of")
    return Change(factors, total)


def low_rank(delta: Tensor, rank: int) -> Factors:
    """Return the factors of a weight's change (out, in, ...), float64, cut off at `rank`.

    The eigenvectors of the smaller Gram matrix are the singular vectors of that side; the other factor is the
    projection of delta on them, so that what is left out is the only error.
    """
    matrix = delta.flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    values, vectors = torch.linalg.eigh(gram)
    energy, vectors = values.flip(0).clamp_min(0), vectors.flip(1)[:, :rank]
    up, down = (matrix @ vectors, vectors.T) if tall else (vectors, vectors.T @ matrix)
    # Both factors of one size, since fp16 is short of range; energies are squares, hence two roots.
    scale = energy[:rank].clamp_min(energy[0] * 1e-24).sqrt().sqrt()
    up, down = (up / scale, down * scale[:, None]) if tall else (up * scale, down / scale[:, None])
    return Factors(up, down.reshape(-1, *delta.shape[1:]), energy)


def adapters(change: Change, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (up, down) of every module, all of one rank: short ones are filled up with zeros.

    One rank everywhere, because not every release of diffusers scales modules of another rank rightly.
    """
    layers = {}
    for name, (up, down, _) in change.factors.items():
        up, down = up[:, :rank].to(dtype), down[:rank].to(dtype)
        missing = rank - up.shape[1]
        up = torch.cat([up, up.new_zeros(len(up), missing)], 1)
        down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        layers[name] = (up, down)
    return layers


@torch.no_grad()
def merged(network: nn.Module, layers: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Return a copy of a network with the adapters added to its weights."""
    copied = copy.deepcopy(network)
    for name, (up, down) in layers.items():
        weight = copied.get_submodule(name).weight
        weight += (up.float() @ down.float().flatten(1)).reshape(weight.shape)
    return copied


def _check_energy(change: Change, rank: int, settings: ExportSettings) -> None:
    kept = change.kept(rank)
    if kept >= settings.min_energy or settings.partial:
        return
    enough = change.rank_for(settings.min_energy)
    instead = f"--rank {enough} does" if enough else "no rank does, since the rest is in norms and biases"
    raise UserError(
        f"--rank {rank} keeps {100 * kept:.1f} % of the change, less than --min_energy {settings.min_energy}, and is "
        f"not the erased model: {instead}; or give --to delta, which keeps all, or --partial"
    )


def _measured(erased: Erased, layers: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return what an adapter loses: the output's error, and the scores of its pictures if somebody can judge them."""
    network = merged(erased.original, layers)
    values: dict[str, Any] = {"output_error": output_error(erased, network)}
    if erased.judge:
        values["scores"] = erased.judge(with_network(erased.pipe, erased.part, network))
    return values


@torch.no_grad()
def output_error(erased: Erased, network: nn.Module) -> float | None:
    """Return |f - f_erased| / |f_base - f_erased| on noise under the concept's name.

    0 is the erased model, 1 the base; None if the erased network answers as the base's does.
    """

    pipe, kind = erased.pipe, family(erased.pipe)
    side = resolution(pipe) // pipe.vae_scale_factor
    cond = encode(pipe, [", ".join(erased.concepts)])
    x_t = torch.randn(1, pipe.vae.config.latent_channels, side, side, generator=generator(0, "output error"))
    t = torch.full((1,), TIMESTEP)
    answers = [kind.call(f, x_t, t, cond).double() for f in (network, erased.network, erased.original)]
    change = (answers[2] - answers[1]).norm()
    return float((answers[0] - answers[1]).norm() / change) if change else None


def _save(erased: Erased, layers: dict[str, tuple[Tensor, Tensor]], folder: Path, facts: dict[str, str]) -> None:
    """Write one adapter in both layouts into a new folder."""
    folder.mkdir()
    peft, kohya = {}, {}
    for name, (up, down) in layers.items():
        up = up.reshape(*up.shape, 1, 1) if down.ndim == 4 else up
        peft |= {f"{erased.part}.{name}.lora_A.weight": down, f"{erased.part}.{name}.lora_B.weight": up}
        if erased.part == "unet":
            place = kohya_name(name, erased.pipe)
            kohya |= {f"{place}.lora_down.weight": down, f"{place}.lora_up.weight": up}
            kohya[f"{place}.alpha"] = torch.tensor(float(len(down)), dtype=down.dtype)
    metadata = erased.metadata(**facts)
    save_file(cast(peft, None, "adapter"), folder / DIFFUSERS_FILE, metadata)
    if kohya:
        save_file(cast(kohya, None, "adapter"), folder / f"{erased.name}-rank-{facts['rank']}.safetensors", metadata)


def kohya_name(module: str, pipe: Any) -> str:
    """Return kohya's name of a UNet's module: by diffusers' names for SD 1 and 2, by LDM's for XL."""
    if type(pipe).__name__ == "StableDiffusionXLPipeline":
        module = unet_name(f"{module}.weight", unet_modules(pipe.unet.config)).removesuffix(".weight")
    return "lora_unet_" + module.replace(".", "_")


def _summary(ranks: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of what each rank keeps; concept and retained objects in percent of the pictures."""
    rows: list[tuple[Any, ...]] = [("rank", "kept energy", "output error", "concept", "retain")]
    for rank, values in ranks.items():
        scores = values.get("scores")
        concept = f"{100 * scores['concept']['after']:.1f} %" if scores else "-"
        retain = f"{100 * scores['retain']['object']['after']:.1f} %" if scores else "-"
        error = "-" if values["output_error"] is None else f"{values['output_error']:.4f}"
        rows.append((rank, f"{100 * values['kept_energy']:.2f} %", error, concept, retain))
    return table(rows)
