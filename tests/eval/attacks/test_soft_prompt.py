"""Prompts of vectors: against loops over tokens, and against the text that they stand for."""

from collections.abc import Callable

import pytest
import torch

from erase_sd.common.errors import UserError
from eval.attacks.soft_prompt import Vocabulary, encoders, filled, marker, marker_id, markers, soft_tokens, tables


@pytest.mark.parametrize("each_row_its_own", [False, True])
def test_filling_is_what_a_loop_over_the_tokens_does(each_row_its_own: bool):
    torch.manual_seed(0)
    ids = torch.tensor([[1, 9, 9, 3, 2], [1, 4, 9, 2, 2], [1, 4, 4, 2, 2]])
    embedded = torch.randn(3, 5, 6)
    vectors = torch.randn(3, 2, 6) if each_row_its_own else torch.randn(2, 6)
    wanted = embedded.clone()
    for row in range(3):
        seen = 0
        for place in range(5):
            if ids[row, place] == 9:
                wanted[row, place] = vectors[row, seen] if each_row_its_own else vectors[seen]
                seen += 1
    assert torch.equal(filled(ids, embedded, 9, vectors), wanted)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_a_prompts_own_embeddings_mean_the_prompt(model: str, toys: Callable, make_setup: Callable):
    setup = make_setup(toys(model))
    words = Vocabulary(setup.pipe)
    own = words.table[words.ids("a cat", 75)]
    with soft_tokens(setup.pipe, words.split(own)), torch.no_grad():
        found = setup.encode([markers(setup.pipe, len(own))])
    with torch.no_grad():
        wanted = setup.encode(["a cat"])
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x)


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_vectors_reach_every_family_and_gradients_reach_them(model: str, toys: Callable, make_setup: Callable):
    torch.manual_seed(0)
    setup = make_setup(toys(model))
    vectors = {name: torch.randn(2, table.shape[1], requires_grad=True) for name, table in tables(setup.pipe).items()}
    with soft_tokens(setup.pipe, vectors):
        cond = setup.encode([f"a {markers(setup.pipe, 2)}"])
    seen = [x for x in cond.values() if x.requires_grad]
    sum((x * torch.randn_like(x)).sum() for x in seen).backward()  # squares would not do: norms are normalised
    for name, x in vectors.items():
        assert x.grad is not None, name
        assert x.grad.abs().sum() > 0, name


def test_the_text_encoders_are_as_before_after_the_block(make_setup: Callable):
    setup = make_setup()
    text = f"a {markers(setup.pipe, 1)}"
    before = setup.encode([text])["encoder_hidden_states"]
    width = tables(setup.pipe)["text_encoder"].shape[1]
    with soft_tokens(setup.pipe, {"text_encoder": torch.ones(1, width)}):
        inside = setup.encode([text])["encoder_hidden_states"]
    assert not torch.equal(inside, before)
    assert torch.equal(setup.encode([text])["encoder_hidden_states"], before)


def test_a_marker_is_a_token_that_stands_alone(make_setup: Callable):
    pipe = make_setup().pipe
    tokenizer = encoders(pipe)["text_encoder"][1]
    assert marker(pipe) == "~"
    assert marker_id(tokenizer, "~") == tokenizer.convert_tokens_to_ids("~</w>")
    assert marker_id(tokenizer, tokenizer.eos_token) is None


def test_encoders_with_tokens_of_their_own_share_no_vocabulary(toys: Callable):
    with pytest.raises(UserError, match="do not share their tokens"):
        Vocabulary(toys("tiny_flux"))
