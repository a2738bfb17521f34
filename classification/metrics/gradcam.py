"""Grad-CAM (Selvaraju et al., arXiv 1610.02391): where a model looks for a class, and the paper's Fig. 1 of it."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from classification.data.dataset import Images
from classification.metrics.accuracy import evaluating, scaled
from erase_sd.common.imaging import sheet


@torch.enable_grad()
def cam(model: nn.Module, layer: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Return heat maps (B, H, W) in [0, 1] of images x (B, C, H, W) for classes (B,), on their device.

    ReLU(sum_c a_c A_c), where A is the output (B, c, h, w) of `layer` and a_c the mean over space of the gradient of
    the class's logit by A_c; each map is stretched to [0, 1], then enlarged bilinearly. The model runs in eval mode
    and no parameter's gradient changes.
    """
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    hook = layer.register_forward_hook(keep)
    try:
        with evaluating(model):
            scores = model(x.detach().requires_grad_())  # so that A has a gradient even where all weights are frozen
    finally:
        hook.remove()
    A = outputs[0]
    (slope,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), A)
    heat = (slope.mean((2, 3), keepdim=True) * A).sum(1, keepdim=True).relu().detach()
    heat = heat - heat.amin((2, 3), keepdim=True)
    heat = heat / (heat.amax((2, 3), keepdim=True) + 1e-7)
    return F.interpolate(heat, x.shape[2:], mode="bilinear")[:, 0]


def last_block(model: nn.Module) -> nn.Module:
    """Return the last block of layer4, before the pooling of every network of ours."""
    return model.layer4[-1]


def figure(
    models: dict[str, nn.Module],
    forget: Images,
    retain: Images,
    *,
    layer: Callable[[nn.Module], nn.Module] = last_block,
    scale: float = 1.0,
) -> Image.Image:
    """Return a sheet with a row per image, those of D_f above those of D_r; the image, then one column per model.

    The maps are those of the true label; `layer` picks the layer of a model, which is on the CPU.
    """
    rows: list[list[Image.Image]] = []
    for images in (forget, retain):
        x = scaled(images.pixels)
        columns = [_pictures(x)]
        for model in models.values():
            heat = cam(model, layer(model), x, images.labels)
            columns.append(_pictures(overlay(x, heat)))
        rows += map(list, zip(*columns, strict=True))
    labels = ["D_f"] * len(forget) + ["D_r"] * len(retain)
    return sheet(rows, labels, ["image", *models], scale)


def overlay(x: Tensor, heat: Tensor) -> Tensor:
    """Return (B, 3, H, W): half images (B, 1 or 3, H, W), half coloured heat maps (B, H, W), at most 1 in each."""
    import matplotlib

    colours = torch.from_numpy(matplotlib.colormaps["jet"](heat.numpy())[..., :3]).float().permute(0, 3, 1, 2)
    mixed = (x + colours) / 2
    return mixed / mixed.amax((1, 2, 3), keepdim=True)


def _pictures(x: Tensor) -> list[Image.Image]:
    """Return images (B, 1 or 3, H, W) in [0, 1] as PIL images."""
    levels = (x.expand(-1, 3, -1, -1) * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(level) for level in levels.contiguous().numpy()]
