"""The weights of LDM's networks, name by name with their shapes, built as LDM's constructors build them.

openaimodel.UNetModel, diffusionmodules.model.Encoder and Decoder, open_clip's TextTransformer. Nothing here knows
diffusers' names. `detected` reads the hyperparameters off a checkpoint, as ComfyUI does.
"""

from typing import NamedTuple

Table = dict[str, tuple[int, ...]]


class UNetShape(NamedTuple):
    """The hyperparameters of openaimodel.UNetModel."""

    channels: int  # model_channels
    mult: tuple[int, ...]  # channel_mult, per level
    depth: tuple[int, ...]  # transformer blocks in an attention, per level; 0 for none
    context: int  # width of the text
    linear: bool  # use_linear_in_transformer
    vector: int = 0  # adm_in_channels
    middle: int = 1  # transformer blocks in the middle
    layers: int = 2  # num_res_blocks
    latent: int = 4


SD1 = UNetShape(320, (1, 2, 4, 4), (1, 1, 1, 0), 768, False)
SD2 = UNetShape(320, (1, 2, 4, 4), (1, 1, 1, 0), 1024, True)
SDXL = UNetShape(320, (1, 2, 4), (0, 2, 10), 2048, True, vector=2816, middle=10)


def layer(name: str, *shape: int) -> Table:
    """A convolution, a Linear or a norm with a bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet(name: str, before: int, after: int, time: int) -> Table:
    table = layer(f"{name}.in_layers.0", before) | layer(f"{name}.in_layers.2", after, before, 3, 3)
    table |= layer(f"{name}.emb_layers.1", after, time)
    table |= layer(f"{name}.out_layers.0", after) | layer(f"{name}.out_layers.3", after, after, 3, 3)
    return table | (layer(f"{name}.skip_connection", after, before, 1, 1) if before != after else {})


def attention(name: str, width: int, context: int, depth: int, linear: bool) -> Table:
    tail = () if linear else (1, 1)
    table = layer(f"{name}.norm", width)
    table |= layer(f"{name}.proj_in", width, width, *tail) | layer(f"{name}.proj_out", width, width, *tail)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attn, source in (("attn1", width), ("attn2", context)):
            table |= {f"{block}.{attn}.to_q.weight": (width, width)}
            table |= {f"{block}.{attn}.to_{kind}.weight": (width, source) for kind in "kv"}
            table |= layer(f"{block}.{attn}.to_out.0", width, width)
        table |= layer(f"{block}.ff.net.0.proj", 8 * width, width) | layer(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            table |= layer(f"{block}.{norm}", width)
    return table


def unet_table(shape: UNetShape) -> Table:
    """Every weight of the UNet."""
    time, width = 4 * shape.channels, shape.channels
    table = layer("time_embed.0", time, width) | layer("time_embed.2", time, time)
    if shape.vector:
        table |= layer("label_emb.0.0", time, shape.vector) | layer("label_emb.0.2", time, time)
    table |= layer("input_blocks.0.0", width, shape.latent, 3, 3)
    skips, number = [width], 1
    for level, mult in enumerate(shape.mult):
        for _ in range(shape.layers):
            block, after = f"input_blocks.{number}", mult * shape.channels
            table |= resnet(f"{block}.0", width, after, time)
            if shape.depth[level]:
                table |= attention(f"{block}.1", after, shape.context, shape.depth[level], shape.linear)
            width, number = after, number + 1
            skips.append(width)
        if level < len(shape.mult) - 1:
            table |= layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            number += 1
            skips.append(width)
    table |= resnet("middle_block.0", width, width, time) | resnet("middle_block.2", width, width, time)
    table |= attention("middle_block.1", width, shape.context, shape.middle, shape.linear)
    number = 0
    for level in reversed(range(len(shape.mult))):
        for i in range(shape.layers + 1):
            block, after, place = f"output_blocks.{number}", shape.mult[level] * shape.channels, 1
            table |= resnet(f"{block}.0", width + skips.pop(), after, time)
            if shape.depth[level]:
                table |= attention(f"{block}.1", after, shape.context, shape.depth[level], shape.linear)
                place = 2
            if level and i == shape.layers:
                table |= layer(f"{block}.{place}.conv", after, after, 3, 3)
            width, number = after, number + 1
    return table | layer("out.0", width) | layer("out.2", shape.latent, width, 3, 3)


def vae_resnet(name: str, before: int, after: int) -> Table:
    table = layer(f"{name}.norm1", before) | layer(f"{name}.conv1", after, before, 3, 3)
    table |= layer(f"{name}.norm2", after) | layer(f"{name}.conv2", after, after, 3, 3)
    return table | (layer(f"{name}.nin_shortcut", after, before, 1, 1) if before != after else {})


def vae_middle(name: str, width: int) -> Table:
    table = vae_resnet(f"{name}.block_1", width, width) | vae_resnet(f"{name}.block_2", width, width)
    table |= layer(f"{name}.attn_1.norm", width)
    for kind in ("q", "k", "v", "proj_out"):
        table |= layer(f"{name}.attn_1.{kind}", width, width, 1, 1)
    return table


def vae_table(channels: int = 128, mult: tuple[int, ...] = (1, 2, 4, 4), layers: int = 2, latent: int = 4) -> Table:
    """Every weight of AutoencoderKL."""
    table = layer("quant_conv", 2 * latent, 2 * latent, 1, 1) | layer("post_quant_conv", latent, latent, 1, 1)
    width = channels
    table |= layer("encoder.conv_in", width, 3, 3, 3)
    for level, factor in enumerate(mult):
        for i in range(layers):
            table |= vae_resnet(f"encoder.down.{level}.block.{i}", width, factor * channels)
            width = factor * channels
        if level < len(mult) - 1:
            table |= layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    table |= vae_middle("encoder.mid", width)
    table |= layer("encoder.norm_out", width) | layer("encoder.conv_out", 2 * latent, width, 3, 3)
    table |= layer("decoder.conv_in", width, latent, 3, 3) | vae_middle("decoder.mid", width)
    for level in reversed(range(len(mult))):
        for i in range(layers + 1):
            table |= vae_resnet(f"decoder.up.{level}.block.{i}", width, mult[level] * channels)
            width = mult[level] * channels
        if level:
            table |= layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return table | layer("decoder.norm_out", width) | layer("decoder.conv_out", 3, width, 3, 3)


def clip_table(width: int, layers: int, words: int = 49408) -> Table:
    """Every weight of OpenAI's CLIP text model."""
    table: Table = {
        "text_model.embeddings.token_embedding.weight": (words, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        block = f"text_model.encoder.layers.{i}"
        for kind in ("q_proj", "k_proj", "v_proj", "out_proj"):
            table |= layer(f"{block}.self_attn.{kind}", width, width)
        table |= layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)
        table |= layer(f"{block}.layer_norm1", width) | layer(f"{block}.layer_norm2", width)
    return table | layer("text_model.final_layer_norm", width)


def open_clip_table(width: int, layers: int, projection: int = 0, words: int = 49408) -> Table:
    """Every weight of OpenCLIP's text tower that a diffusers model has."""
    table: Table = {"token_embedding.weight": (words, width), "positional_embedding": (77, width)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        table |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        table |= layer(f"{block}.attn.out_proj", width, width)
        table |= layer(f"{block}.mlp.c_fc", 4 * width, width) | layer(f"{block}.mlp.c_proj", width, 4 * width)
        table |= layer(f"{block}.ln_1", width) | layer(f"{block}.ln_2", width)
    table |= layer("ln_final", width)
    return table | ({"text_projection": (width, projection)} if projection else {})


def detected(unet: dict) -> UNetShape:
    """The hyperparameters of a UNet by its keys and shapes, walked through as ComfyUI's model detection does."""
    channels, latent = unet["input_blocks.0.0.weight"][:2]
    mult, depth, number, layers, found = [], [], 1, 0, 0
    while any(name.startswith(f"input_blocks.{number}.") for name in unet):
        if f"input_blocks.{number}.0.op.weight" in unet:
            layers, found = found, 0
        else:
            if found == 0:
                mult.append(unet[f"input_blocks.{number}.0.out_layers.3.weight"][0] // channels)
                depth.append(_depth(unet, f"input_blocks.{number}.1"))
            found += 1
        number += 1
    first = next(name for name in unet if name.endswith("attn2.to_k.weight"))
    return UNetShape(
        channels=channels,
        mult=tuple(mult),
        depth=tuple(depth),
        context=unet[first][1],
        linear=len(unet["middle_block.1.proj_in.weight"]) == 2,
        vector=unet["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in unet else 0,
        middle=_depth(unet, "middle_block.1"),
        layers=layers,
        latent=latent,
    )


def _depth(unet: dict, block: str) -> int:
    numbers = {
        name.split(".")[4 if block.startswith("input") else 3] for name in unet if f"{block}.transformer" in name
    }
    return len(numbers)
