"""Named parameter groups: which weights a method may touch.

A group is a pattern searched in a parameter's name, so it holds for any diffusers UNet with the names of SD v1.x.
ESD's `train_method` names (arXiv 2303.07345) keep their meaning; the sizes below are those of SD v1.4.
"""

import re

from torch import nn

from erase_sd.process import UserError

_NOT_OUTPUT_OR_TIME = r"^(?!conv_norm_out\.|conv_out\.|time_embedding\.)"

GROUPS: dict[str, str] = {
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


def select(model: nn.Module, scope: str) -> dict[str, nn.Parameter]:
    """The parameters of `model` in `scope`, by name and in the model's order.

    `scope` is a key of GROUPS or "re:" and a regular expression searched in each parameter's name.
    Raises UserError if the group is unknown, the expression is broken or nothing matches.
    """
    pattern = scope.removeprefix("re:") if scope.startswith("re:") else GROUPS.get(scope)
    if pattern is None:
        raise UserError(f"unknown parameter group {scope!r}: {_choices()}")
    try:
        found = {name: p for name, p in model.named_parameters() if re.search(pattern, name)}
    except re.error as error:
        raise UserError(f"parameter group {scope!r} is not a regular expression ({error}): {_choices()}") from error
    if not found:
        raise UserError(f"parameter group {scope!r} matches nothing in {type(model).__name__}: {_choices()}")
    return found


def without_norms(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """`parameters` less those of normalisation layers, whose re-initialisation would break every image alike.

    A layer counts as one if its class name contains "Norm" (GroupNorm, LayerNorm, BatchNorm2d, RMSNorm, ...).
    """
    layers = (module for module in model.modules() if "Norm" in type(module).__name__)
    norms = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    return {name: p for name, p in parameters.items() if id(p) not in norms}


def _choices() -> str:
    return f"use one of {', '.join(GROUPS)}, or 're:' and a regular expression over parameter names"
