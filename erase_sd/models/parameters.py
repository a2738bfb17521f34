"""Named parameter groups: which weights a method may touch.

A group is a pattern searched in a parameter's name, for each kind of network its own. ESD's `train_method` names
(arXiv 2303.07345) keep their meaning: "xattn" is where the text comes in, "selfattn" where pixels look at each other,
"kv" the text's keys and values. In a joint attention both meet, and only the projections tell
them apart; Flux's single blocks have one set of projections for text and pixels, which counts as "selfattn".
"""

import re

from torch import nn

from erase_sd.common.errors import UserError

_NOT_OUTPUT_OR_TIME = r"^(?!conv_norm_out\.|conv_out\.|time_embedding\.)"

_JOINT = r"\.attn\.(add_[qkv]_proj|to_add_out|norm_added_[qk])\."  # the text's side of a joint attention
_OUTER = r"^(norm_out|proj_out|time_text_embed)\."

_UNET: dict[str, str] = {  # sizes: SD v1.4
    "full": r"",  # 859,520,964
    "attn": r"\.attn[12]\.",  # 93,536,640
    "xattn": r"\.attn2\.",  # 43,962,560
    "selfattn": r"\.attn1\.",  # 49,574,080
    "noxattn": _NOT_OUTPUT_OR_TIME + r"(?!.*\.attn2\.)",  # 813,495,680
    "notime": _NOT_OUTPUT_OR_TIME,  # 857,458,240
    "xlayer": r"^up_blocks\.2\.attentions\.[02]\..*\.attn2\.",  # 3,605,760
    "selflayer": r"^down_blocks\.[12]\.attentions\.0\..*\.attn1\.",  # 8,193,920
    "kv": r"\.attn2\.to_[kv]\.",  # 19,169,280
    "authors": r"^up_blocks\.[12]\.attentions\.1\..*\.attn1\.",  # 8,193,920: what the released code re-initialises
}
_TRANSFORMER: dict[str, str] = {
    "full": r"",
    "attn": r"\.attn2?\.",
    "xattn": _JOINT,
    "selfattn": r"\.attn2?\.(?!add_|to_add|norm_added)",
    "noxattn": rf"^(?!.*{_JOINT})(?!{_OUTER[1:]})",
    "notime": rf"^(?!{_OUTER[1:]})",
    "kv": r"\.attn\.add_[kv]_proj\.",
}
GROUPS: dict[str, dict[str, str]] = {
    "UNet2DConditionModel": _UNET,
    "SD3Transformer2DModel": _TRANSFORMER,
    "FluxTransformer2DModel": _TRANSFORMER,
}


def select(model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` in `scope`, by name and in the model's order.

    `scope` is a group of the model's kind or "re:" and a regular expression searched in each parameter's name.
    Raises UserError if the group is unknown, the expression is broken or nothing matches.
    """
    groups = GROUPS.get(type(model).__name__, _UNET)
    choices = f"use one of {', '.join(groups)}, or 're:' and a regular expression over parameter names"
    pattern = scope.removeprefix("re:") if scope.startswith("re:") else groups.get(scope)
    if pattern is None:
        raise UserError(f"unknown parameter group {scope!r} of a {type(model).__name__}: {choices}")
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"parameter group {scope!r} is not a regular expression ({error}): {choices}") from error
    found = {}
    for name, p in model.named_parameters():
        if expression.search(name):
            found[name] = p
    if not found:
        raise UserError(f"parameter group {scope!r} matches nothing in {type(model).__name__}: {choices}")
    return found


def without_norms(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return `parameters` less those of normalisation layers, whose re-initialisation would break every image alike.

    A layer counts as one if its class name contains "Norm" (GroupNorm, LayerNorm, RMSNorm, ...), with the layers
    inside it: the scale and shift that adaptive norms of transformers (AdaLayerNormZero) compute from the timestep.
    """
    norms: set[int] = set()
    for module in model.modules():
        if "Norm" in type(module).__name__:
            norms.update(map(id, module.parameters()))
    return {name: p for name, p in parameters.items() if id(p) not in norms}
