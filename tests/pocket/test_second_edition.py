"""The second edition's training code, on made-up sprites and few steps: what it renders, says, leaves out, resumes."""

import random
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from erase_sd.common.rng import generator
from erase_sd.pocket import prompt_sets, world
from erase_sd.pocket.training import artwork, fit, oracle, report, unet, vae


@pytest.fixture(scope="module")
def known() -> torch.Tensor:
    """Sprites (houses, objects, 4, S, S): a disc of another colour for each, premultiplied."""
    side = torch.linspace(-1, 1, artwork.SPRITE)
    disc = (side[:, None] ** 2 + side**2 < 0.7).float()
    colours = torch.rand(len(artwork.HOUSES), len(world.OBJECTS), 3, generator=generator(0, "sprites"))
    alpha = disc.expand(*colours.shape[:2], 1, -1, -1)
    return (torch.cat([colours[..., None, None] * alpha, alpha], 2) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the second edition."""
    return unet.build_tokenizer()


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up latents (300, 16, 8, 8) and labels (300, 3)."""
    g = generator(0, "data")
    labels = torch.stack([torch.randint(len(names), (300,), generator=g) for names in world.KINDS.values()], 1)
    return torch.randn(300, unet.LATENT_CHANNELS, 8, 8, generator=g).half(), labels


def test_a_scene_is_64_pixels_and_depends_on_its_key_alone(known: torch.Tensor) -> None:
    x, labels = artwork.scenes(known, 16, generator(0, "a"))
    torch.manual_seed(1)
    again, _ = artwork.scenes(known, 16, generator(0, "a"))
    assert x.shape == (16, 3, 64, 64)
    assert labels.shape == (16, 3)
    assert x.min() >= -1
    assert x.max() <= 1
    assert torch.equal(x, again)


def test_the_ground_keeps_its_colour_under_every_treatment(known: torch.Tensor) -> None:
    for style in range(len(world.STYLES)):
        for ground, name in enumerate(world.BACKGROUNDS):
            x = artwork.render(known[0, :1], torch.tensor([style]), torch.tensor([ground]), generator(0, style))
            corner = (x[0, :, 0, 0] + 1) / 2
            assert (corner - torch.tensor(artwork.COLOURS[name])).abs().max() < 0.12, (name, style)


@pytest.mark.parametrize("kind", world.KINDS)
def test_every_thing_has_other_wordings_and_one_of_them_shares_no_token_with_its_word(kind: str, tokenizer) -> None:
    for word in world.KINDS[kind]:
        others = world.OTHER_WORDINGS[kind][word]
        own = set(tokenizer.tokenize(word))
        assert 2 <= len(others) <= 3
        assert len(own) == 1
        assert any(own.isdisjoint(tokenizer.tokenize(other)) for other in others), word


def test_no_wording_names_two_things() -> None:
    wordings = [other for things in world.OTHER_WORDINGS.values() for others in things.values() for other in others]
    names = [word for names in world.KINDS.values() for word in names]
    assert len(set(wordings + names)) == len(wordings + names)
    for word in names:
        claimed = [other for other in wordings if word in other.split()]
        thing = next(things[word] for things in world.OTHER_WORDINGS.values() if word in things)
        assert set(claimed) <= set(thing), word


def test_canonical_and_other_sentences() -> None:
    scene = world.Scene("octopus", "pencil", "red")
    assert world.caption(scene) == "an octopus in pencil style on a red background"
    texts = {world.reworded(scene, random.Random(i)) for i in range(100)}
    assert "a kraken sketched with a pencil on a crimson background" in texts
    assert len(texts) == 8
    assert not any("octopus" in text or " red " in text for text in texts)
    assert world.caption(world.Scene(None, None, "blue")) == "something on a blue background"


def test_training_captions_use_every_wording_and_sometimes_say_nothing() -> None:
    scene, rng = world.Scene("hamburger", "mosaic", "yellow"), random.Random(0)
    texts = {world.varied(scene, rng) for _ in range(2000)}
    assert world.caption(scene) in texts
    assert "" in texts
    for kind, word in scene._asdict().items():
        for phrase in [world.canonical(kind, word), *world.OTHER_WORDINGS[kind][word]]:
            assert any(phrase in text for text in texts), phrase


def test_the_exam_in_other_words_asks_for_the_same_pictures() -> None:
    questions = prompt_sets.exam([("object", "frog")], 20, 0)
    texts = prompt_sets.reworded_texts(questions)
    assert texts == prompt_sets.reworded_texts(questions)
    assert all("toad" in text or "amphibian" in text for text in texts)
    assert all("frog" in text for text in prompt_sets.canonical_texts(questions))


def test_retrain_sees_no_held_out_concept_in_picture_or_caption(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    latents, labels = data
    kept, named = unet.without(latents, labels, unet.HELD_OUT)
    assert 0 < len(kept) == len(named) < len(latents)
    for kind, word in unet.HELD_OUT:
        index = world.KINDS[kind].index(word)
        assert (labels[:, list(world.KINDS).index(kind)] == index).any()
        assert not (named[:, list(world.KINDS).index(kind)] == index).any()
    said = " ".join(unet.captions_of(named.repeat(20, 1), random.Random(0)))
    for kind, word in unet.HELD_OUT:
        for phrase in [world.canonical(kind, word), *world.OTHER_WORDINGS[kind][word]]:
            assert phrase not in said


def test_hidden_padding_is_that_of_the_empty_caption(tokenizer) -> None:
    hidden, empty = torch.ones(3, 77, 4), torch.zeros(77, 4)
    lengths = torch.tensor([len(ids) for ids in tokenizer(["a cat", "", "a dog"]).input_ids])
    seen = unet.hide_padding(hidden, empty, lengths, torch.tensor([True, True, False]))
    assert lengths.tolist() == [4, 2, 4]  # the end token counts as the caption's own
    assert seen[:, :, 0].sum(1).tolist() == [4, 2, 77]
    assert seen[0, :4].all()
    assert not seen[0, 4:].any()


def test_a_resumed_training_equals_an_uninterrupted_one(
    data: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unet, "BATCH", 2)
    whole = unet.train(*data, tmp_path / "whole", cycles=(2, 1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unet, "denoising_loss", _failing_at(3))
        unet.train(*data, tmp_path / "parts", cycles=(2, 1))
    resumed = unet.train(*data, tmp_path / "parts", cycles=(2, 1))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def _failing_at(call: int):
    """A loss that is interrupted at its n-th call."""
    original, calls = unet.denoising_loss, []

    def loss(*args) -> torch.Tensor:
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args)

    return loss


def test_a_later_cycle_goes_on_from_a_warm_start_alone(
    data: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unet, "BATCH", 2)
    learnt = unet.train(*data, tmp_path / "first", cycles=(1, 1))
    fit.warm_start(tmp_path / "first" / "cycle-2", tmp_path / "moved" / "cycle-2")
    moved = unet.train(*data, tmp_path / "moved", cycles=(1, 1))
    assert not (tmp_path / "moved" / "cycle-1").exists()
    for name, tensor in learnt.state_dict().items():
        assert torch.equal(tensor.half().float(), moved.state_dict()[name]), name
    monkeypatch.setattr(unet, "TEXT_CYCLES", 2)
    further = unet.train(*data, tmp_path / "moved", cycles=(1, 1, 1))
    assert torch.equal(further.text_encoder.final_layer_norm.weight, moved.text_encoder.final_layer_norm.weight)
    assert not torch.equal(further.unet.conv_out.weight, moved.unet.conv_out.weight)


def test_a_given_text_encoder_does_not_learn(
    data: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer
) -> None:
    monkeypatch.setattr(unet, "BATCH", 2)
    given = unet.build_text_encoder(tokenizer)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    model = unet.train(*data, tmp_path, cycles=(1,), text_encoder=given)
    assert model.text_encoder is given
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())


def test_the_decoder_learns_on_and_the_latents_stay(
    known: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "BATCH", 2)
    coder, judge = vae.build().eval(), oracle.Oracle64()
    x, _ = artwork.scenes(known, 2, generator(0, "x"))
    before, drawn = coder.encode(x).latent_dist.mean, vae.through(coder)(x)
    vae.sharpen(coder, known, judge, tmp_path, steps=2)
    assert torch.equal(coder.encode(x).latent_dist.mean, before)
    assert not torch.equal(vae.through(coder)(x), drawn)


def test_whitening_changes_no_reconstruction(known: torch.Tensor) -> None:
    torch.manual_seed(0)
    coder = vae.build().eval().requires_grad_(False)
    x, _ = artwork.scenes(known, 16, generator(0, "white"))
    before = vae.through(coder)(x)
    vae.whiten_(coder, x)
    z = coder.encode(x).latent_dist.mean
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(16), atol=1e-3)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(16), atol=1e-3)
    assert torch.allclose(before, vae.through(coder)(x), atol=1e-3)


def test_the_oracle_calls_everything_else_other(known: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    others = known.flatten(0, 1)[:6]
    for make in oracle.NOTHING:
        x, labels = make(known, others, 4, generator(0, make.__name__))
        assert x.shape == (4, 3, 64, 64)
        assert labels.shape == (4, 3)
        assert set(labels[:, 0].tolist()) <= {len(world.OBJECTS), oracle.IGNORE}
    monkeypatch.setattr(oracle, "BATCH", 12)
    x, labels = oracle.batch(known, others, generator(0, "batch"))
    logits = oracle.Oracle64()(oracle.worn(x, generator(0, "worn")))
    assert [tuple(part.shape) for part in logits.values()] == [(len(x), 21), (len(x), 5), (len(x), 9)]
    assert len(oracle.packed(oracle.Oracle64())) < 1_000_000


def test_the_folder_is_a_plain_pipeline_in_fp32(tmp_path: Path, tokenizer) -> None:
    pipe = unet.assemble(vae.build(), unet.Denoiser(tokenizer))
    unet.save_half(pipe, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 20_000_000
    assert not any("_name_or_path" in file.read_text() for file in tmp_path.rglob("*.json"))
    loaded = StableDiffusionPipeline.from_pretrained(str(tmp_path))
    stored = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") and tensor.dtype == torch.float16 for name, tensor in stored.items())
    for name, tensor in loaded.text_encoder.state_dict().items():
        assert torch.equal(tensor, pipe.text_encoder.state_dict()[name].half().float()), name
    assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.float32}
    drawn = loaded("a kitten on a crimson background", num_inference_steps=1).images[0]
    assert drawn.size == (64, 64)


def test_a_share_comes_with_n_and_interval_and_becomes_a_row() -> None:
    scored = report.share(97, 100)
    assert scored["n"] == 100
    assert scored["share"] == 0.97
    assert scored["ci95"][0] < 0.97 < scored["ci95"][1]
    rows = report.table({"vae": {"l1": 0.05, "n": 10}, "pipeline": {"other": {"object": scored}}})
    assert rows[0] == "| vae, L1 of a reconstruction in [-1, 1] | 0.0500 | | 10 |"
    assert rows[1].startswith("| pipeline, other, object | 97.0% | 91.5% to 99.0% | 100 |")
