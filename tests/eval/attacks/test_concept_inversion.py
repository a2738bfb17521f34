"""A linear toy: the network answers with the sum of what it is told, and has to answer the clean latent.

MSE(sum_j v_j, z_i)  is least where the v add up to the mean of all z_i
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eval.attacks import attack

SHAPE = (4, 2, 2)


class Words(nn.Module):
    """A text encoder that repeats its embeddings, which are all zero."""

    dtype = torch.float32
    device = torch.device("cpu")
    config = SimpleNamespace()

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 16)
        nn.init.zeros_(self.table.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.table(input_ids))


class Linear(nn.Module):
    """A network that answers with the sum of its text, whatever the latent."""

    dtype = torch.float32
    device = torch.device("cpu")
    config = SimpleNamespace(sample_size=2)

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=encoder_hidden_states.sum(1).view(-1, *SHAPE))


@pytest.mark.parametrize("vectors", [1, 3])
def test_inversion_finds_the_known_optimum_of_a_linear_toy(make_setup: Callable, vectors: int):
    setup = make_setup()
    pipe = setup.pipe
    pipe.text_encoder, pipe.unet = Words(len(pipe.tokenizer)), Linear()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    torch.manual_seed(0)
    z = torch.randn(SHAPE) + 0.1 * torch.randn(4, *SHAPE)  # alike enough for few steps on few of them
    setup = replace(setup, examples=z)
    search = attack(
        "concept-inversion",
        given={"vectors": vectors, "pictures": 4, "steps": 150, "lr": 0.05, "weight_decay": 0.0, "batch_size": 4},
    )
    ready = search.prepare(setup)
    learned = ready.tensors["text_encoder"].sum(0).view(SHAPE)
    torch.testing.assert_close(learned, z.mean(0), atol=0.1, rtol=0)
    assert ready.gradient_steps == 150 * 4


def test_the_vectors_stand_where_the_concepts_words_stood(make_setup: Callable):
    setup = make_setup()
    assert setup.concept.replaced("a penguin on ice", "~ ~") == "a ~ ~ on ice"
    assert setup.concept.replaced("two Penguin", "~") == "two ~"
    assert setup.concept.replaced("ice", "~") == "ice ~"


def test_the_model_itself_stays_as_it_was(make_setup: Callable):
    setup = make_setup()
    before = {name: x.clone() for name, x in setup.pipe.text_encoder.state_dict().items()}
    search = attack("concept-inversion", given={"pictures": 4, "steps": 3, "batch_size": 2})
    search.prepare(setup)
    for name, x in setup.pipe.text_encoder.state_dict().items():
        assert torch.equal(x, before[name]), name
