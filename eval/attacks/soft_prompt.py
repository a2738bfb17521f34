"""Prompts of vectors: token embeddings that no word has, in the place of marker tokens.

    text = f"a {markers(pipe, 4)} in a garden"
    with soft_tokens(pipe, vectors):           # {"text_encoder": (4, D)}, one entry for each text encoder
        cond = encode([text])                  # or sample: what a pipeline of any family encodes itself

The j-th marker of a caption becomes the j-th vector. Texts without markers, such as negative prompts, stay as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.models.families import Cond, modules
from eval.attacks.base import AttackSetup, AttackTarget

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

CANDIDATES = "~*^@#_"  # characters that prompts hardly contain, of which every tokenizer knows one


def encoders(pipe: DiffusionPipeline) -> dict[str, tuple[nn.Module, Any]]:
    """Return {"text_encoder": (module, tokenizer), ...} of the text encoders that the pipeline has."""
    return {
        name: (part, pipe.components[name.replace("text_encoder", "tokenizer")])
        for name, part in modules(pipe).items()
        if name.startswith("text_encoder")
    }


def tables(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """Return the vocabulary of each text encoder: (V, D) embeddings, fp32, detached."""
    return {name: part.get_input_embeddings().weight.detach().float() for name, (part, _) in encoders(pipe).items()}


def marker(pipe: DiffusionPipeline) -> str:
    """Return a character that every tokenizer of the pipeline knows as a token. Raises UserError if there is none."""
    for character in CANDIDATES:
        if all(marker_id(tokenizer, character) is not None for _, tokenizer in encoders(pipe).values()):
            return character
    raise UserError(f"no tokenizer of this model knows any of {' '.join(CANDIDATES)}: leave white-box prompts out")


def marker_id(tokenizer: Any, character: str) -> int | None:
    """Return the token of a character, which others may precede (a T5's space); None if it is no token of its own."""
    ids = tokenizer(f"{character} {character}", add_special_tokens=False).input_ids
    return ids[-1] if ids.count(ids[-1]) == 2 and ids[-1] not in tokenizer.all_special_ids else None


def markers(pipe: DiffusionPipeline, n: int) -> str:
    """Return a text of n markers."""
    return " ".join([marker(pipe)] * n)


def filled(ids: Tensor, embedded: Tensor, marked: int, vectors: Tensor) -> Tensor:
    """Return embeddings (B, L, D) of token ids (B, L) with the vectors where a row's markers stand, in their order.

    The vectors are (n, D), the same for all rows, or (B, n, D).
    """
    places = ids == marked
    order = (places.cumsum(1) - 1).clamp(0, vectors.shape[-2] - 1)
    each = vectors.to(embedded).expand(len(ids), -1, -1)
    chosen = each.gather(1, order[..., None].expand(-1, -1, each.shape[-1]))
    return torch.where(places[..., None], chosen, embedded)


@contextmanager
def soft_tokens(pipe: DiffusionPipeline, vectors: dict[str, Tensor]) -> Iterator[None]:
    """Have the text encoders see vectors for markers inside the block, see `filled`; gradients reach the vectors."""
    character = marker(pipe)
    with ExitStack() as stack:
        for name, (part, tokenizer) in encoders(pipe).items():
            hook = _hook(marker_id(tokenizer, character), vectors[name])
            for embedding in embeddings(part):
                stack.callback(embedding.register_forward_hook(hook).remove)
        yield


def embeddings(encoder: nn.Module) -> list[nn.Embedding]:
    """Return the modules that look tokens up: T5 names one its input's and calls another with the same weight."""
    table = encoder.get_input_embeddings().weight
    found = []
    for module in encoder.modules():
        if isinstance(module, nn.Embedding) and module.weight.data_ptr() == table.data_ptr():
            found.append(module)
    return found


def _hook(marked: int, vectors: Tensor) -> Any:
    def replace(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return filled(inputs[0], output, marked, vectors)

    return replace


def encode_vectors(setup: AttackSetup, words: Vocabulary, vectors: Tensor, n: int) -> Cond:
    """Return what the network sees of n prompts of vectors (L, sum of D) or (n, L, sum of D), with their gradient."""
    with soft_tokens(setup.pipe, words.split(vectors)):
        return setup.encode([markers(setup.pipe, vectors.shape[-2])] * n)


def sample_vectors(setup: AttackSetup, words: Vocabulary, vectors: Tensor, target: AttackTarget) -> list[Image.Image]:
    """Return the picture that a prompt of vectors (L, sum of D) gives from the target's seed."""
    with soft_tokens(setup.pipe, words.split(vectors)):
        return setup.sample_targets([target], [markers(setup.pipe, len(vectors))])


class Vocabulary:
    """One vocabulary for all text encoders: the embeddings of a token are the encoders' side by side, (V, sum of D).

    Raises UserError where the encoders' tokenizers differ: a discrete token is then no single thing.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        there = encoders(pipe)
        self.pipe, self.tokenizer = pipe, pipe.tokenizer
        if any(tokenizer.get_vocab() != self.tokenizer.get_vocab() for _, tokenizer in there.values()):
            raise UserError("the text encoders of this model do not share their tokens: leave discrete attacks out")
        by_encoder = tables(pipe)
        self.table = torch.cat(list(by_encoder.values()), 1)
        self.widths = {name: table.shape[1] for name, table in by_encoder.items()}

    def ids(self, text: str, most: int) -> list[int]:
        """Return the tokens of a text without start and end, at most so many."""
        return self.tokenizer(text, add_special_tokens=False).input_ids[:most]

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Split vectors (..., sum of D) into what each text encoder sees of them."""
        return dict(zip(self.widths, vectors.split(list(self.widths.values()), -1), strict=True))

    @property
    def room(self) -> int:
        """Return how many tokens the longest prompt has between start and end."""
        return self.tokenizer.model_max_length - 2
