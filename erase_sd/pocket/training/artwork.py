"""Real emoji artwork of four design houses, rasterised and rendered into scenes; only training needs it.

Sources (npm packages, never committed; see ATTRIBUTION.md): @iconify-json/{fluent-emoji-flat,noto,twemoji,fxemoji}.
Get them with `npm pack` or `npm install` and point `--artwork` at the folder that holds them.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.pocket.world import BACKGROUNDS, KINDS, OBJECTS, STYLES

HOUSES = ["fluent-emoji-flat", "noto", "twemoji", "fxemoji"]
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
SPRITE, SIZE = 128, 64  # pixels: a rasterised icon, a rendered scene
TILES = 16  # blocks along a side in mosaic style
# Icons too like one of the twenty objects to count as "something else".
RELATED = """
    cat dog bear frog penguin bird fish octopus turtle snail banana lemon strawberry melon grape cherr tomato burger
    doughnut donut cookie shark whale dolphin wolf fox lion tiger squid duck chick eagle parrot apple tangerine orange
    peach panda poodle kitten koala swan owl dove rooster turkey flamingo dodo bagel moon circle kiwi berries raccoon
    mouse hamster rabbit otter seal blowfish tropical keycap flag
""".split()
COLOURS = {
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.05),
    "red": (0.86, 0.14, 0.16),
    "green": (0.16, 0.62, 0.24),
    "blue": (0.15, 0.33, 0.84),
    "yellow": (0.97, 0.86, 0.18),
    "pink": (0.98, 0.62, 0.77),
    "gray": (0.52, 0.52, 0.52),
}


def _icons(root: Path, house: str) -> dict:
    """Read the icons.json of one house, from an unpacked package or its npm tarball anywhere below root."""
    for path in sorted(root.rglob("icons.json")):
        if house in str(path.parent):
            return json.loads(path.read_text())
    for path in sorted(root.rglob(f"*{house}*.tgz")):
        with tarfile.open(path) as tar:
            return json.load(tar.extractfile("package/icons.json"))
    raise UserError(f"no icons of @iconify-json/{house} below {root}: run `npm pack @iconify-json/{house}` there")


def rasterise(icons: dict, name: str) -> np.ndarray:
    """Draw one icon as premultiplied RGBA uint8 (SPRITE, SPRITE, 4)."""
    import resvg_py

    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = f'<svg {NAMESPACES} viewBox="{box}" width="{SPRITE}" height="{SPRITE}">{icon["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE, height=SPRITE))
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((SPRITE, SPRITE)), np.float32) / 255
    return (np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1) * 255).round().astype(np.uint8)


def load_sprites(root: str | Path, others: int = 150) -> tuple[Tensor, Tensor]:
    """Load sprites of the objects (houses, objects, 4, S, S) and of other icons (houses * others, 4, S, S), uint8.

    `root` holds the packages, or is the file that `save_sprites` wrote of them.
    """
    if Path(root).is_file():
        stored = load_file(root)
        return stored["known"], stored["others"]
    known, rest = [], []
    for house in HOUSES:
        icons = _icons(Path(root), house)
        known.append(np.stack([rasterise(icons, name) for name in OBJECTS]))
        names = sorted(name for name in icons["icons"] if not any(word in name for word in RELATED))
        chosen = np.linspace(0, len(names) - 1, others).astype(int)
        rest.append(np.stack([rasterise(icons, names[i]) for i in chosen]))
    return _as_tensor(known), _as_tensor(rest).flatten(0, 1)


def save_sprites(known: Tensor, others: Tensor, path: Path) -> None:
    """Write rasterised sprites to one file, so that a machine without npm and resvg can train."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"known": known, "others": others}, path)


def _as_tensor(sprites: list[np.ndarray]) -> Tensor:
    """Stack arrays (N, S, S, 4), one for each house, to uint8 (houses, N, 4, S, S)."""
    return torch.from_numpy(np.stack(sprites)).movedim(-1, -3).contiguous()


def _uniform(n: int, low: float, high: float, g: torch.Generator) -> Tensor:
    """Draw n numbers between low and high."""
    return torch.rand(n, generator=g) * (high - low) + low


def place(sprites: Tensor, g: torch.Generator) -> Tensor:
    """Flip, rotate (+-14 degrees), scale and move at random: (B, 4, S, S) uint8 -> float in [0, 1]."""
    n = len(sprites)
    angle, scale = _uniform(n, -14, 14, g) * math.pi / 180, _uniform(n, 0.74, 0.92, g)
    flip = (torch.rand(n, generator=g) < 0.5).float() * 2 - 1
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    room = (1 - scale) * 0.8 + 0.02
    right, down = _uniform(n, -1, 1, g) * room, _uniform(n, -1, 1, g) * room
    matrix = torch.stack([flip * cos, -flip * sin, right, sin, cos, down], dim=1).view(n, 2, 3)
    where = F.affine_grid(matrix, [n, 4, SPRITE, SPRITE], align_corners=False)
    return F.grid_sample(sprites.float() / 255, where, align_corners=False)


def _pencil(rgb: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the artwork into a grey line drawing: dark contours on light paper, a little of the shading kept."""
    light = (rgb * rgb.new_tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)).sum(1, keepdim=True) + (1 - alpha)
    field = torch.cat([light, alpha], 1)
    dx = F.pad(field, (1, 1, 0, 0), mode="replicate")
    dy = F.pad(field, (0, 0, 1, 1), mode="replicate")
    edges = ((dx[..., 2:] - dx[..., :-2]).square() + (dy[..., 2:, :] - dy[..., :-2, :]).square()).sqrt().amax(1, True)
    edges = F.max_pool2d(edges, 5, 1, 2).clamp(max=0.8) / 0.8  # lines of two to three pixels in the picture
    grey = 0.93 - 0.18 * (1 - light) - 0.72 * edges
    return grey.clamp(0.1, 1).expand(-1, 3, -1, -1) * alpha, alpha


def _blur(x: Tensor) -> Tensor:
    """Average twice over 17 x 17 pixels at a quarter of the resolution: (B, C, S, S) -> (B, C, S, S)."""
    small = F.avg_pool2d(x, 4)
    for _ in range(2):
        small = F.avg_pool2d(small, 5, 1, 2, count_include_pad=False)
    return F.interpolate(small, scale_factor=4, mode="bilinear")


def _neon(rgb: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Inverted, saturated colours with a halo of the same light around them."""
    solid = alpha - rgb
    grey = solid.mean(1, keepdim=True)
    vivid = (grey + 1.7 * (solid - grey)).clamp(0, 1).minimum(alpha)
    halo = _blur(alpha).clamp(max=1)
    glow = (_blur(vivid) * 0.5 + 0.5 * halo * alpha.new_tensor([0.35, 1.0, 0.95]).view(1, 3, 1, 1)).minimum(halo)
    return vivid + glow * (1 - alpha), alpha + halo * (1 - alpha)


def _mosaic(rgb: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Cut into TILES x TILES coarse blocks, each either wholly there or not at all."""
    layer = F.adaptive_avg_pool2d(torch.cat([rgb, alpha], 1), TILES)
    colour = layer[:, :3] / layer[:, 3:].clamp(min=1e-3)
    there = (layer[:, 3:] > 0.45).float()
    layer = F.interpolate(torch.cat([colour.clamp(0, 1) * there, there], 1), size=SPRITE, mode="nearest")
    return layer[:, :3], layer[:, 3:]


def _flat(rgb: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the artwork as it was drawn."""
    return rgb, alpha


TREATMENTS = {"flat": _flat, "pencil": _pencil, "neon": _neon, "mosaic": _mosaic}


def render(sprites: Tensor, styles: Tensor, backgrounds: Tensor, g: torch.Generator) -> Tensor:
    """Render scenes (B, 3, 64, 64) in [-1, 1] from sprites (B, 4, S, S) uint8 and style / background indices (B,)."""
    layers = place(sprites, g)
    rgb, alpha = layers[:, :3].clone(), layers[:, 3:].clone()
    for index, name in enumerate(STYLES):
        rows = (styles == index).nonzero().flatten()
        if len(rows):
            rgb[rows], alpha[rows] = TREATMENTS[name](layers[rows, :3], layers[rows, 3:])
    paint = torch.tensor([COLOURS[name] for name in BACKGROUNDS])[backgrounds]
    paint = paint + _uniform(len(paint), -0.04, 0.04, g)[:, None]
    paint = paint + (torch.rand(len(paint), 3, generator=g) - 0.5) * 0.05
    picture = F.avg_pool2d(rgb + (1 - alpha) * paint.clamp(0, 1)[:, :, None, None], SPRITE // SIZE)
    return picture.clamp(0, 1) * 2 - 1


def scenes(known: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n random renders (n, 3, 64, 64) and their (object, style, background) indices (n, 3)."""
    house = torch.randint(len(HOUSES), (n,), generator=g)
    labels = torch.stack([torch.randint(len(names), (n,), generator=g) for names in KINDS.values()], 1)
    return render(known[house, labels[:, 0]], labels[:, 1], labels[:, 2], g), labels
