"""The pocket AutoencoderKL: 32 px pictures to 8 x 8 x 8 latents of unit variance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from erase_sd.common.rng import generator
from erase_sd.pocket.training import artwork
from erase_sd.pocket.training.fit import fit

STEPS, BATCH, LR = 4000, 32, 1.5e-3


def build() -> AutoencoderKL:
    """2.7 M parameters, three levels of one layer each."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=artwork.SIZE,
        scaling_factor=1.0,
    )


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """L1 of pixels and of their horizontal and vertical differences, which keeps contours sharp."""
    dx = lambda t: t[..., 1:] - t[..., :-1]  # noqa: E731
    dy = lambda t: t[..., 1:, :] - t[..., :-1, :]  # noqa: E731
    return (x - y).abs().mean() + (dx(x) - dx(y)).abs().mean() + (dy(x) - dy(y)).abs().mean()


def train(known: Tensor, folder: Path, *, steps: int = STEPS, seed: int = 0) -> AutoencoderKL:
    """Train on fresh renders; returns the averaged weights with whitened latents."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build()

    def loss(step: int) -> Tensor:
        g = generator(seed, "vae", step)
        x, _ = artwork.scenes(known, BATCH, g)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
            y = vae.decode(z).sample
        return reconstruction_loss(x, y.float()) + 1e-6 * posterior.kl().mean()

    fit(vae, loss, folder, steps=steps, lr=LR)
    vae.eval().requires_grad_(False)
    whiten_(vae, artwork.scenes(known, 1024, generator(seed, "whiten"))[0])
    return vae


def whiten_(vae: AutoencoderKL, x: Tensor) -> None:
    """Fold each latent channel's mean and scale into the two 1x1 convolutions, so that scaling_factor is 1.

    Exact: z' = (z - mean) / std through quant_conv, its inverse through post_quant_conv.
    """
    z = vae.encode(x).latent_dist.mean
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    quant, post, n = vae.quant_conv, vae.post_quant_conv, len(mean)
    post.bias.data += post.weight.data.flatten(1) @ mean
    post.weight.data *= std.view(1, n, 1, 1)
    quant.weight.data[:n] /= std.view(n, 1, 1, 1)
    quant.bias.data[:n] = (quant.bias.data[:n] - mean) / std
    quant.bias.data[n:] -= 2 * std.log()


def through(vae: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """Encode and decode: pictures (B, 3, 32, 32) as the pipeline would show them at best."""

    @torch.no_grad()
    def there_and_back(x: Tensor) -> Tensor:
        return vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)

    return there_and_back
