"""The pocket model's training code, on made-up sprites and few steps: what it renders, teaches and resumes."""

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.pocket import world
from erase_sd.pocket.oracle import LABELS
from erase_sd.pocket.training import artwork, fit, vae
from erase_sd.pocket.training import oracle as judge
from erase_sd.pocket.training import unet as text


@pytest.fixture(scope="module")
def known() -> torch.Tensor:
    """Sprites (houses, objects, 4, S, S): a disc of another colour for each, premultiplied."""
    side = torch.linspace(-1, 1, artwork.SPRITE)
    disc = (side[:, None] ** 2 + side**2 < 0.7).float()
    colours = torch.rand(len(artwork.HOUSES), len(world.OBJECTS), 3, generator=generator(0, "sprites"))
    alpha = disc.expand(*colours.shape[:2], 1, -1, -1)
    return (torch.cat([colours[..., None, None] * alpha, alpha], 2) * 255).to(torch.uint8)


def test_scenes_are_pictures_and_depend_on_their_key_alone(known: torch.Tensor) -> None:
    x, _ = artwork.scenes(known, 64, generator(0, "a"))
    torch.manual_seed(1)
    again, _ = artwork.scenes(known, 64, generator(0, "a"))
    assert x.shape == (64, 3, artwork.SIZE, artwork.SIZE) and x.min() >= -1 and x.max() <= 1
    assert torch.equal(x, again) and not torch.equal(x, artwork.scenes(known, 64, generator(0, "b"))[0])


def test_the_ground_keeps_its_colour_under_every_treatment(known: torch.Tensor) -> None:
    for style in range(len(world.STYLES)):
        for ground, name in enumerate(world.BACKGROUNDS):
            x = artwork.render(known[0, :1], torch.tensor([style]), torch.tensor([ground]), generator(0, style))
            corner = (x[0, :, 0, 0] + 1) / 2
            assert (corner - torch.tensor(artwork.COLOURS[name])).abs().max() < 0.12, (name, world.STYLES[style])


def test_pencil_is_grey_and_mosaic_is_blocks(known: torch.Tensor) -> None:
    grey, _ = artwork.TREATMENTS["pencil"](*_layers(known))
    assert (grey.amax(1) - grey.amin(1)).max() < 1e-6
    _, alpha = artwork.TREATMENTS["mosaic"](*_layers(known))
    assert set(alpha.unique().tolist()) == {0.0, 1.0}


def _layers(known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = artwork.place(known[0, :4], generator(0, "place"))
    return x[:, :3], x[:, 3:]


def test_missing_artwork_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="npm pack @iconify-json/fluent-emoji-flat"):
        artwork.load_sprites(tmp_path)


def test_captions_are_varied_and_true_to_their_scene() -> None:
    scene, rng = world.Scene("octopus", "neon", "blue"), random.Random(0)
    texts = {world.varied(scene, rng) for _ in range(500)}
    assert world.caption(scene) == "an octopus in neon style on a blue background" in texts
    assert "" in texts and len(texts) > 15
    other = [w for names in world.KINDS.values() for w in names if w not in scene]
    assert not any(word in text.split() for word in other for text in texts)


def test_the_tokenizer_has_one_token_per_word_and_takes_any_text() -> None:
    tokenizer = text.build_tokenizer()
    for words in world.KINDS.values():
        assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert tokenizer.model_max_length == 77
    assert len(tokenizer("Ünï 42 !", padding="max_length").input_ids) == 77


def test_whitening_changes_no_reconstruction(known: torch.Tensor) -> None:
    torch.manual_seed(0)
    coder = vae.build().eval().requires_grad_(False)
    x, _ = artwork.scenes(known, 32, generator(0, "white"))
    before = vae.through(coder)(x)
    vae.whiten_(coder, x)
    z = coder.encode(x).latent_dist.mean
    torch.testing.assert_close(vae.through(coder)(x), before, atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)


def test_everything_that_is_nothing_is_labelled_other(known: torch.Tensor) -> None:
    strangers = known.flatten(0, 1)
    for make in judge.NOTHING:
        x, labels = make(known, strangers, 6, generator(0, make.__name__))
        assert x.shape == (6, 3, 32, 32) and labels.shape == (6, 3)
        assert set(labels[:, 0].tolist()) <= {len(LABELS["object"]) - 1, judge.IGNORE}


def test_the_judge_learns(known: torch.Tensor, tmp_path: Path) -> None:
    oracle = judge.train(known, known.flatten(0, 1)[:3], tmp_path, steps=40)
    x, labels = artwork.scenes(known, 200, generator(1, "exam"))
    assert judge.accuracy(oracle, x, labels)["background"] > 0.5  # chance is 0.11


def test_training_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "EVERY", 3)

    def train(folder: Path, stop_after: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)

        def loss(step: int) -> torch.Tensor:
            if step == stop_after:
                raise KeyboardInterrupt
            return model(torch.randn(8, 4, generator=generator(0, step))).square().mean()

        fit.fit(model, loss, folder, steps=10, lr=1e-2)
        return model.weight.detach()

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", stop_after=8)
    assert torch.equal(train(tmp_path / "killed"), train(tmp_path / "whole"))
    with pytest.raises(UserError, match="10 steps, not 20"):
        fit.fit(nn.Linear(4, 2), lambda step: torch.zeros(()), tmp_path / "whole", steps=20, lr=1e-2)
