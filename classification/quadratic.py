"""The projection by a solver, as the released code has it: what the closed form is timed against."""

from __future__ import annotations

import numpy as np
import torch

from erase_sd.core.projection import subtract_
from erase_sd.core.task import Params
from erase_sd.process import UserError


def solved_(g: Params, g_f: Params, lam: float) -> float:
    """g_r becomes the projected g_o = g_r - lam g_f in place; returns v, 0 where nothing had to be projected.

    GEM's dual program on the host in float64: min 1/2 v'(MM')v + (M g_o)'v over v >= 0, with the one memory M = -g_f.
    """
    subtract_(g, g_f, lam)
    u, memory = _joined(g), -_joined(g_f)[None]
    if memory @ u >= 0:
        return 0.0
    v = dual(memory, u)
    rest = torch.from_numpy(u + v @ memory)
    for x in g.values():
        part, rest = rest[: x.numel()], rest[x.numel() :]
        x.copy_(part.view(x.shape))
    return float(v[0])


def _joined(x: Params) -> np.ndarray:
    return torch.cat([part.reshape(-1) for part in x.values()]).cpu().double().numpy()


def dual(memory: np.ndarray, u: np.ndarray) -> np.ndarray:
    """v (m,) for memories (m, n) and a gradient u (n,), all float64. Raises UserError without quadprog."""
    try:
        from quadprog import solve_qp
    except ModuleNotFoundError as error:
        raise UserError("quadprog is not installed: pip install quadprog, or the extra test") from error
    m = len(memory)
    return solve_qp(memory @ memory.T, -memory @ u, np.eye(m), np.zeros(m))[0]
