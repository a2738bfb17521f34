"""Keyed generators: every random draw depends on the seed and on what it is for, never on what was drawn before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator

from erase_sd.common.files import digest


def generator(seed: int, *key: int | str) -> Generator:
    """Return a CPU generator that depends on (seed, key) alone: ("noise", step, sample), ("trim", parameter name), ...

    torch keeps 32 bits of a CPU seed, so that two of 65 000 keys can be expected to share their stream.
    """
    return Generator().manual_seed(int(digest([seed, *key])[:15], 16))


@contextmanager
def keyed_rng(seed: int, *key: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Make torch's global generators of the CPU and `device` follow (seed, key) inside, and go on as before outside.

    For what draws from the global state only: initialisers and dropout.
    """
    cuda = torch.device(device).type == "cuda"
    s = generator(seed, *key).initial_seed()
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(s)  # torch.manual_seed would reseed devices that are not forked
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(s)
        yield
