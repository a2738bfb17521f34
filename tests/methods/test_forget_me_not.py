"""Forget-Me-Not: recorded attention against torch's softmax, and where a concept stands in a caption."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.denoising.samples import marks
from erase_sd.methods.forget_me_not import ForgetMeNot, recorded
from tests.conftest import Alone


def test_recorded_attention_is_the_softmax_and_changes_no_answer(tiny_pipe: StableDiffusionPipeline) -> None:
    unet, rng = tiny_pipe.unet, generator(0, "attention")
    x, t, c = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([10, 900]), torch.randn(2, 77, 32, generator=rng)
    crossing = {name: m for name, m in unet.named_modules() if name.endswith("attn2")}
    seen, processors = {}, dict(unet.attn_processors)
    hooks = [m.to_q.register_forward_hook(lambda m, i, q, n=name: seen.update({n: q})) for name, m in crossing.items()]
    with torch.no_grad():
        plain = unet(x, t, c).sample
        with recorded(unet) as layers:
            answer = unet(x, t, c).sample
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(answer, plain, rtol=1e-4, atol=1e-5)
    assert unet.attn_processors == processors
    assert len(layers) == len(crossing) == 16
    for probabilities, name in zip(layers, seen, strict=True):
        attn, (n, pixels, width) = crossing[name], seen[name].shape
        q = seen[name].view(n, pixels, attn.heads, width // attn.heads).transpose(1, 2)
        k = attn.to_k(c).view(n, 77, attn.heads, width // attn.heads).transpose(1, 2)
        wanted = (q @ k.transpose(-1, -2) / (width // attn.heads) ** 0.5).softmax(-1)
        torch.testing.assert_close(probabilities, wanted, rtol=1e-4, atol=1e-6)


class Attentive(Alone):
    """A task of one picture's width whose network is the tiny UNet."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.model, self.seed, rng = pipe.unet, 0, generator(0, "attentive")
        self.b = SimpleNamespace(
            z_f=torch.randn(2, 4, 8, 8, generator=rng),
            noise_f=torch.randn(2, 4, 8, 8, generator=rng),
            t_f=torch.tensor([10, 900]),
            c_f=torch.randn(2, 77, 32, generator=rng),
            marks=torch.tensor([[0, 1, 1, 0, 2] + [0] * 72, [0, 0, 1, 2, 0] + [0] * 72]),
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if "attn2.to_k" in n}

    def batch(self, purpose: str, step: int) -> SimpleNamespace:
        return self.b

    def add_noise(self, x0, noise, t):
        return x0 + noise

    def predict(self, x, t, c):
        return self.model(x, t, c).sample


@pytest.mark.parametrize("pooler", [True, False])
def test_the_loss_is_the_norm_of_the_attention_to_the_concept(
    tiny_pipe: StableDiffusionPipeline, pooler: bool
) -> None:
    task = Attentive(tiny_pipe)
    with torch.no_grad(), recorded(task.model) as layers:
        task.predict(task.b.z_f + task.b.noise_f, task.b.t_f, task.b.c_f)
    places = [[1, 2, 4], [2, 3]] if pooler else [[1, 2], [2]]
    wanted = [torch.cat([p[i, :, :, at].flatten() for p in layers]).norm() for i, at in enumerate(places)]
    losses = [record["loss"] for record, _ in ForgetMeNot(steps=4, lr=1e-2, optimizer="adamw", pooler=pooler)(task)]
    assert losses[0] == pytest.approx(float(sum(wanted) / 2), rel=1e-5)
    assert losses[-1] < losses[0]
    assert all("SDPA" in type(p).__name__ or "2_0" in type(p).__name__ for p in task.model.attn_processors.values())


def test_a_caption_without_the_concept(tiny_pipe: StableDiffusionPipeline) -> None:
    task = Attentive(tiny_pipe)
    task.b.marks[1] = 0
    with pytest.raises(UserError, match="--anchor"):
        next(ForgetMeNot(steps=1)(task))


def test_a_network_without_cross_attention() -> None:
    with pytest.raises(UserError, match="cross-attention"):
        ForgetMeNot().check_network(nn.Linear(2, 2), ())


def words(pipe: StableDiffusionPipeline, caption: str, anchor: str) -> str:
    """The marked letters: the tiny tokenizer has a token for each."""
    (row,) = marks(pipe.tokenizer, [caption], [anchor])
    text = caption.replace(" ", "")
    assert row.shape == (77,)
    assert (row == 2).nonzero().tolist() == [[len(text) + 1]]
    return "".join(letter for letter, mark in zip(text, row[1:].tolist(), strict=False) if mark == 1)


def test_the_concept_is_what_the_anchor_does_not_share(tiny_pipe: StableDiffusionPipeline) -> None:
    assert words(tiny_pipe, "xyz in red", "uvw in red") == "xyz"
    assert words(tiny_pipe, "fig in neon style", "fig in mart style") == "neon"
    assert words(tiny_pipe, "fig in neon", "fig") == "inneon"
    assert words(tiny_pipe, "fig", "fig") == ""


def test_recorded_under_gradient_checkpointing(tiny_pipe: StableDiffusionPipeline) -> None:
    """The forward pass that is computed again must not count twice."""
    losses = []
    for checkpointing in (False, True):
        task = Attentive(tiny_pipe)
        before = {name: x.clone() for name, x in task.model.state_dict().items()}
        if checkpointing:
            task.model.enable_gradient_checkpointing()
        losses.append([record["loss"] for record, _ in ForgetMeNot(steps=3, lr=1.0)(task)])
        task.model.load_state_dict(before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]
