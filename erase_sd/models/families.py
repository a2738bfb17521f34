"""The model families: what each is made of, what its captions become, and how its network is called.

    Stable Diffusion 1.x, 2.x, XL   a UNet that predicts noise or velocity
    Stable Diffusion 3, Flux        a transformer that predicts a flow

Everywhere else latents are (n, C, H, W), timesteps run from 0 to 1000, and a caption's conditioning is a dict of
tensors of n rows, named as the network's own arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from erase_sd.common.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Cond = dict[str, Tensor]


def _unpacked(z: Tensor) -> Tensor:
    """Return latents as they are: all pipelines but Flux's return them as (n, C, H, W)."""
    return z


class SamplingDefaults(NamedTuple):
    """How a family's pictures are drawn unless told otherwise."""

    guidance: float  # classifier-free scale; of Flux dev the distilled one, which training gives its network as well
    steps: int  # of the pictures that are learnt from
    shown_steps: int  # of those that are looked at


@dataclass(frozen=True)
class Family:
    """How a kind of pipeline is used for erasing."""

    part: str  # the component that is erased
    needed: tuple[str, ...]  # the components that a complete model has
    encode: Callable[[DiffusionPipeline, list[str], float, int], Cond]  # (pipeline, captions, guidance, pixels a side)
    call: Callable[[Callable, Tensor, Tensor, Cond], Tensor]  # (network, x_t, t, cond) -> shaped like x_t
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]  # network's configuration -> those of one caption's cond
    widths: tuple[str, str, tuple[str, ...]]  # network's key = sum of the encoders' key: they fit each other
    sampling: SamplingDefaults
    side: int | None = None  # of the latents that the model was made for, where its configuration does not say
    patch: int = 1  # latent pixels in one input of the network
    unpacked: Callable[[Tensor], Tensor] = _unpacked  # latents as the pipeline returns them -> (n, C, H, W)

    def latents(self, network: Any, vae: Any, pixels: int | None) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the latents of an image with this side, by default the model's own.

        `network` and `vae` are the configurations of these parts.
        """
        side = self.side or network.sample_size
        if pixels:
            side = pixels // 2 ** (len(vae.block_out_channels) - 1)
        return network.in_channels // self.patch, side, side


def _encode_sd(pipe: DiffusionPipeline, captions: list[str], guidance: float, side: int) -> Cond:
    return {"encoder_hidden_states": pipe.encode_prompt(captions, pipe.text_encoder.device, 1, False)[0]}


def _call_sd(network: Callable, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return network(x_t, t, **cond).sample


def _encode_sdxl(pipe: DiffusionPipeline, captions: list[str], guidance: float, side: int) -> Cond:
    """Encode captions; the empty one is all zeros where the pipeline samples it so."""
    device = pipe.text_encoder.device
    hidden, _, pooled, _ = pipe.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:
        empty = torch.tensor([not caption for caption in captions], device=hidden.device)
        hidden, pooled = hidden.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
    time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(captions), dtype=hidden.dtype)
    return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": time_ids}


def _call_sdxl(network: Callable, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
    return network(x_t, t, cond["encoder_hidden_states"], added_cond_kwargs=added).sample


def _encode_sd3(pipe: DiffusionPipeline, captions: list[str], guidance: float, side: int) -> Cond:
    device = pipe.text_encoder.device
    hidden, _, pooled, _ = pipe.encode_prompt(captions, None, None, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def _call_sd3(network: Callable, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return network(hidden_states=x_t, timestep=t, **cond).sample


def _encode_flux(pipe: DiffusionPipeline, captions: list[str], guidance: float, side: int) -> Cond:
    """Encode captions; distilled guidance is an input of the network (dev), or nothing (schnell)."""
    hidden, pooled, _ = pipe.encode_prompt(captions, None, device=pipe.text_encoder.device)
    cond = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
    if pipe.transformer.config.guidance_embeds:
        cond["guidance"] = torch.full((len(captions),), guidance)
    return cond


def _call_flux(network: Callable, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Call the network with latents as sequences of 2 x 2 patches, and time as sigma in [0, 1]."""
    from diffusers import FluxPipeline

    n, channels, height, width = x_t.shape
    places = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, x_t.device, x_t.dtype)
    packed = network(
        hidden_states=FluxPipeline._pack_latents(x_t, n, channels, height, width),
        timestep=t / 1000,
        img_ids=places,
        txt_ids=places.new_zeros(cond["encoder_hidden_states"].shape[1], 3),
        **cond,
    ).sample
    return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)


def _unpack_flux(z: Tensor) -> Tensor:
    """Return (n, C, H, W) of square images: the pipeline's latents do not say how they are laid out."""
    from diffusers import FluxPipeline

    side = 2 * isqrt(z.shape[1])
    return FluxPipeline._unpack_latents(z, side, side, vae_scale_factor=1)


def _shapes_sd(config: Any) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (77, config.cross_attention_dim)}


def _shapes_sdxl(config: Any) -> dict[str, tuple[int, ...]]:
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {"text_embeds": (pooled,), "time_ids": (6,), **_shapes_sd(config)}


def _shapes_sd3(config: Any) -> dict[str, tuple[int, ...]]:
    text = (77 + 256, config.joint_attention_dim)  # CLIP's tokens and T5's
    return {"encoder_hidden_states": text, "pooled_projections": (config.pooled_projection_dim,)}


def _shapes_flux(config: Any) -> dict[str, tuple[int, ...]]:
    shapes = {"encoder_hidden_states": (512, config.joint_attention_dim)}
    shapes["pooled_projections"] = (config.pooled_projection_dim,)
    if config.guidance_embeds:
        shapes["guidance"] = ()
    return shapes


SCHNELL = SamplingDefaults(0.0, 4, 4)  # Flux without an input for guidance: distilled to four steps
_ONE = ("vae", "text_encoder", "tokenizer", "scheduler")
_TWO = (*_ONE, "text_encoder_2", "tokenizer_2")  # Stable Diffusion 3 may have a third, T5, or not
_BOTH = ("text_encoder", "text_encoder_2")
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        part="unet",
        needed=("unet", *_ONE),
        encode=_encode_sd,
        call=_call_sd,
        shapes=_shapes_sd,
        widths=("cross_attention_dim", "hidden_size", ("text_encoder",)),
        sampling=SamplingDefaults(7.5, 20, 30),
    ),
    "StableDiffusionXLPipeline": Family(
        part="unet",
        needed=("unet", *_TWO),
        encode=_encode_sdxl,
        call=_call_sdxl,
        shapes=_shapes_sdxl,
        widths=("cross_attention_dim", "hidden_size", _BOTH),
        sampling=SamplingDefaults(5.0, 25, 30),
    ),
    "StableDiffusion3Pipeline": Family(
        part="transformer",
        needed=("transformer", *_TWO),
        encode=_encode_sd3,
        call=_call_sd3,
        shapes=_shapes_sd3,
        widths=("pooled_projection_dim", "projection_dim", _BOTH),
        sampling=SamplingDefaults(7.0, 28, 28),
    ),
    "FluxPipeline": Family(
        part="transformer",
        needed=("transformer", *_TWO),
        encode=_encode_flux,
        call=_call_flux,
        shapes=_shapes_flux,
        widths=("joint_attention_dim", "hidden_size", ("text_encoder_2",)),
        side=128,
        sampling=SamplingDefaults(3.5, 28, 28),
        patch=4,
        unpacked=_unpack_flux,
    ),
}


def family(pipe: DiffusionPipeline | str) -> Family:
    """Return the family of a pipeline or of its class's name. Raises UserError for one that cannot be erased."""
    name = pipe if isinstance(pipe, str) else type(pipe).__name__
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"a {name} cannot be erased: give a text-to-image model of one of {known}")
    return FAMILIES[name]


def sampling_defaults(kind: Family, network: nn.Module) -> SamplingDefaults:
    """Return how pictures of a network of this family are drawn unless told otherwise.

    Guidance and steps of SDXL, 3 and Flux are those of diffusers' pipelines, SDXL's 50 steps being fewer here.
    """
    distilled = network.config.get("guidance_embeds") is False
    return SCHNELL if distilled else kind.sampling


def resolution(pipe: DiffusionPipeline) -> int:
    """Return the side, in pixels, of the images that the model was made for."""
    native = getattr(pipe, "default_sample_size", None) or network(pipe).config.sample_size
    return native * pipe.vae_scale_factor


def network(pipe: DiffusionPipeline) -> nn.Module:
    """Return the denoising network of a pipeline: what is erased."""
    return getattr(pipe, family(pipe).part)


def modules(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return every component with weights, by name."""
    found = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            found[name] = part
    return found
