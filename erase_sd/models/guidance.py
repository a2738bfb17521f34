"""Safe Latent Diffusion: guidance away from a concept, as a hook that a denoising network carries.

    d = e_p - e_S                              e_0, e_p, e_S: answers to no caption, to the prompt, to the concept
    mu = min(1, s_S |d|) where d < lambda, else 0
    gamma = mu (e_S - e_0) + s_m nu
    nu <- beta nu + (1 - beta) gamma           also in the warm-up; 0 when an image starts
    e = e_0 + s_g (e_p - e_0 - gamma)          after the warm-up

Schramowski et al., CVPR 2023, arXiv 2211.05105, elementwise as in their code. A pipeline with classifier-free guidance
asks the network for e_0 and e_p in one batch, the same latents twice; the hook sees that, asks for e_S, and answers
e_p - gamma in the place of e_p, so that the pipeline's own formula is the last line. Without classifier-free guidance
(scale <= 1) there is no e_0 and nothing is subtracted, as in their code.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from erase_sd.common.files import digest, write_atomic

FILE = "guidance.safetensors"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The paper's hyperparameters."""

    warmup: int  # delta: network calls of an image before guidance
    scale: float  # s_S
    threshold: float  # lambda
    momentum_scale: float  # s_m
    momentum: float  # beta


class SafetyGuidance:
    """A forward hook; `text` is the conditioning of k concepts, tensors (k, ...) named as the network's arguments.

    Several concepts take turns: e_S of the i-th network call of an image is that of concept i modulo k.
    """

    def __init__(self, text: dict[str, Tensor], settings: Settings) -> None:
        self.text, self.settings = text, settings
        self.calls, self.first, self.last, self.nu = 0, 0.0, 0.0, None

    def identity(self) -> str:
        """Return a hash of what decides its images."""
        text = {name: x.tolist() for name, x in sorted(self.text.items())}
        return digest([asdict(self.settings), text])

    def __call__(self, network: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Return the network's output with e_p - gamma for e_p; None (no change) where the batch is not doubled."""
        given = inspect.signature(type(network).forward).bind(network, *args, **kwargs).arguments
        del given["self"]
        x = next(iter(given.values()))
        n = len(x) // 2
        if len(x) % 2 or not torch.equal(x[:n], x[n:]):
            return None
        wide = torch.promote_types(output[0].dtype, torch.float32)
        e_0, e_p = output[0].to(wide).chunk(2)
        self._begin(e_p, float(torch.as_tensor(given["timestep"]).flatten()[0]))
        third = {}
        for name, value in given.items():
            third[name] = self._third(name, value, n)
        e_S = network.forward(**third)[0].to(wide)
        gamma = self._gamma(e_0, e_p, e_S)
        return _replaced(output, torch.cat([e_0, e_p - gamma]).to(output[0].dtype))

    def _third(self, name: str, value: Any, n: int) -> Any:
        """Return an argument of the third branch: the prompts' half of it, or the concept's conditioning."""
        if name in self.text:
            turn = self.calls % len(self.text[name])
            row = self.text[name][turn : turn + 1]
            return row.to(value.device, value.dtype).expand(n, *row.shape[1:])
        if isinstance(value, dict):
            return {key: self._third(key, inner, n) for key, inner in value.items()}
        if isinstance(value, Tensor) and value.ndim and len(value) == 2 * n:
            return value[n:]
        return value

    def _begin(self, e_p: Tensor, t: float) -> None:
        """Start anew where timestep t is the first of an image."""
        if self.nu is None or self.nu.shape != e_p.shape or t >= self.first or t > self.last:  # time runs down
            self.calls, self.first, self.nu = 0, t, torch.zeros_like(e_p)
        self.last = t

    def _gamma(self, e_0: Tensor, e_p: Tensor, e_S: Tensor) -> Tensor:
        """Return what is subtracted from e_p; 0 in the warm-up."""
        s, d = self.settings, e_p - e_S
        mu = torch.where(d < s.threshold, (s.scale * d.abs()).clamp(max=1), 0)
        gamma = mu * (e_S - e_0) + s.momentum_scale * self.nu
        self.nu = (s.momentum * self.nu + (1 - s.momentum) * gamma).detach()
        self.calls += 1
        return gamma if self.calls > s.warmup else torch.zeros_like(gamma)


def _replaced(output: Any, sample: Tensor) -> Any:
    """Return a network's output, a tuple or diffusers' own, with another sample."""
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


def attach(network: nn.Module, guidance: SafetyGuidance) -> None:
    """Make a network carry guidance from now on, in place of any that it carried."""
    for key, hook in list(network._forward_hooks.items()):
        if isinstance(hook, SafetyGuidance):
            del network._forward_hooks[key], network._forward_hooks_with_kwargs[key]
    network.register_forward_hook(guidance, with_kwargs=True)


def carried(network: nn.Module) -> SafetyGuidance | None:
    """Return the guidance that a network carries, or None."""
    for hook in network._forward_hooks.values():
        if isinstance(hook, SafetyGuidance):
            return hook
    return None


def copy(source: nn.Module, target: nn.Module) -> None:
    """Make `target` carry what `source` carries."""
    if guidance := carried(source):
        attach(target, guidance)


def identity(network: nn.Module) -> list[str]:
    """Return what decides the images of a network besides its weights: the hash of its guidance, or nothing."""
    guidance = carried(network)
    return [guidance.identity()] if guidance else []


def save(guidance: SafetyGuidance, folder: str | Path) -> None:
    """Write folder/guidance.safetensors: the concepts' conditioning, the settings as metadata."""
    text = {}
    for name, x in guidance.text.items():
        text[name] = x.detach().cpu().contiguous()
    write_atomic(Path(folder) / FILE, to_bytes(text, {"settings": json.dumps(asdict(guidance.settings))}))


def load(source: str) -> SafetyGuidance | None:
    """Return the guidance of a run folder, of its network's own folder, or of a Hub repository; None without."""
    path = _local_file(Path(source)) if Path(source).is_dir() else _hub_file(source)
    if path is None:
        return None
    text = {}
    with safe_open(path, "pt") as file:
        settings = Settings(**json.loads(file.metadata()["settings"]))
        for name in list(file.keys()):
            text[name] = file.get_tensor(name)
    return SafetyGuidance(text, settings)


def _local_file(folder: Path) -> Path | None:
    """Return the guidance stored in a folder, or beside it if it is the network's own; None without."""
    folders = [folder]
    if (folder / "config.json").is_file():
        folders.append(folder.parent)
    for place in folders:
        if (place / FILE).is_file():
            return place / FILE
    return None


def _hub_file(repository: str) -> str | None:
    """Return the path of a Hub repository's guidance on this machine; None if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(repository, FILE)
    except EntryNotFoundError:
        return None
