"""The pocket AutoencoderKL: 64 px pictures to 8 x 8 x 16 latents of unit variance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from erase_sd.common.rng import generator
from erase_sd.pocket.training import artwork
from erase_sd.pocket.training.fit import fit
from erase_sd.pocket.training.oracle import Oracle64

STEPS, BATCH, LR = 2800, 8, 1.5e-3
GROUPS = 2  # of the normalisations: one of few channels cannot carry a colour
ALONE = 834  # steps of pixels alone; the oracle was ready then
SHARPEN_STEPS, SHARPEN_LR = 1500, 6e-4
PERCEPTUAL = 0.5  # weight of the oracle's distances
LATENT_NOISE = 0.05


def build() -> AutoencoderKL:
    """Build 2.6 M parameters, four levels of one layer each; narrow where the picture is large and time goes."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=GROUPS,
        sample_size=artwork.SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    start_linear_(vae)
    return vae


def start_linear_(vae: AutoencoderKL) -> None:
    """Initialise the network as a nearly linear map that passes on what it is given; the residual branches start at 0.

    From the default initialisation colours take a thousand steps to find their way through twenty normalisations.
    """
    for name, module in vae.named_modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, nn.Conv2d) and ".upsamplers." in name:
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and not name.endswith(("conv1", "conv2", "decoder.conv_out")):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)
    # A posterior of variance one would drown the latents in noise for the first thousand steps.
    vae.quant_conv.bias.data[vae.config.latent_channels :] = -6
    vae.quant_conv.weight.data[vae.config.latent_channels :] *= 0.1


def along_x(t: Tensor) -> Tensor:
    """Take differences of horizontal neighbours: (B, C, H, W) -> (B, C, H, W - 1)."""
    return t[..., 1:] - t[..., :-1]


def along_y(t: Tensor) -> Tensor:
    """Take differences of vertical neighbours: (B, C, H, W) -> (B, C, H - 1, W)."""
    return t[..., 1:, :] - t[..., :-1, :]


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """Add the L1 of pixels and of their horizontal and vertical differences, which keeps contours sharp."""
    error = x - y
    return error.abs().mean() + along_x(error).abs().mean() + along_y(error).abs().mean()


def perceptual_loss(oracle: Oracle64, x: Tensor, y: Tensor) -> Tensor:
    """Average the L1 distances of the oracle's feature maps, which tell an eye from a smear where pixels hardly do."""
    with torch.no_grad():
        wanted = oracle.features(x)
    distances = [(a - b).abs().mean() for a, b in zip(wanted, oracle.features(y), strict=True)]
    return torch.stack(distances).mean()


def train(
    known: Tensor,
    oracle: Oracle64 | None,
    folder: Path,
    *,
    steps: int = STEPS,
    alone: int = ALONE,
    seed: int = 0,
    device: str = "cpu",
) -> AutoencoderKL:
    """Train on fresh renders; returns the averaged weights with whitened latents.

    The oracle's distances join after the first `alone` steps: until then there is nothing for it to recognise, and its
    own training can run beside this one.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = build().to(device)
    if oracle is not None:
        oracle.to(device)

    def loss(step: int) -> Tensor:
        g = generator(seed, "vae", step)
        x = artwork.scenes(known, BATCH, g)[0].to(device)
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g).to(device)
        y = vae.decode(z).sample
        total = reconstruction_loss(x, y) + 1e-6 * posterior.kl().mean()
        if step < alone or oracle is None:
            return total
        return total + PERCEPTUAL * perceptual_loss(oracle, x, y)

    fit(vae, loss, folder, steps=steps, lr=LR)
    vae.eval().requires_grad_(False).cpu()
    whiten_(vae, artwork.scenes(known, 512, generator(seed, "whiten"))[0])
    return vae


def sharpen(
    vae: AutoencoderKL,
    known: Tensor,
    oracle: Oracle64,
    folder: Path,
    *,
    steps: int,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train the decoder on, in place; the encoder stays, and with it what a UNet has learnt of its latents."""
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    decoder.train().requires_grad_(True)
    vae.to(device)
    oracle.to(device)

    def loss(step: int) -> Tensor:
        g = generator(seed, "sharpen", step)
        x = artwork.scenes(known, BATCH, g)[0].to(device)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        # What a UNet draws is near the latents, not on them: the decoder learns to forgive as much.
        y = vae.decode(z + LATENT_NOISE * torch.randn(z.shape, generator=g).to(device)).sample
        return reconstruction_loss(x, y) + PERCEPTUAL * perceptual_loss(oracle, x, y)

    fit(decoder, loss, folder, steps=steps, lr=SHARPEN_LR)
    vae.eval().requires_grad_(False).cpu()


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
    """Return what encodes and decodes pictures (B, 3, 64, 64): as the pipeline would show them at best."""

    @torch.no_grad()
    def there_and_back(x: Tensor) -> Tensor:
        return vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)

    return there_and_back
