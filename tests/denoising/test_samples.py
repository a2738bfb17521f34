"""The model's own images: sampled once, whatever happens in between, and never another model's."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from erase_sd.denoising import samples
from erase_sd.denoising.samples import Samples, Sources, collect, sampled, scheduler_settings
from erase_sd.models.pipeline import encode
from erase_sd.settings import Sampling
from prompts import Example

SETTINGS = Sampling(forget_images=5, retain_images=4, sample_steps=2, sample_guidance=3.0, sample_batch_size=4)
SOURCES = Sources(
    [Example("a cat", "cat", "an object"), Example("a photo of a cat", "a photo of a cat", "a photo of an object")],
    ["a dog", "a lake", "an object"],
)


class Sampler:
    """Counts the images that are really sampled, and is interrupted after so many chunks."""

    def __init__(self, sample, breaks_after: int | None = None) -> None:
        self.sample, self.breaks_after, self.chunks, self.images = sample, breaks_after, 0, 0

    def __call__(self, pipe, prompts, seeds, **options):
        if self.chunks == self.breaks_after:
            raise KeyboardInterrupt
        self.chunks, self.images = self.chunks + 1, self.images + len(prompts)
        return self.sample(pipe, prompts, seeds, **options)


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    sampler = Sampler(samples.sample)
    monkeypatch.setattr(samples, "sample", sampler)
    monkeypatch.setattr(samples, "CHUNK", 2)
    return sampler


def hidden_states(pipe: StableDiffusionPipeline, texts: list[str]) -> torch.Tensor:
    return encode(pipe, texts)["encoder_hidden_states"]


def assert_equal(one: Samples, two: Samples) -> None:
    for x, y in zip(one, two, strict=True):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            assert all(torch.equal(x[name], y[name]) for name in x)
        else:
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_what_is_collected(tiny_pipe: StableDiffusionPipeline, sampler: Sampler) -> None:
    s = collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", None)
    assert s.forget.shape == (5, 4, 8, 8)
    assert s.retain.shape == (4, 4, 8, 8)
    assert s.forget.dtype == torch.float32
    hidden = s.embeddings["encoder_hidden_states"]
    texts = ["cat", "a photo of a cat", "cat", "a photo of a cat", "cat"]
    anchors = ["an object", "a photo of an object", "an object", "a photo of an object", "an object"]
    for rows, wanted in ((s.caption, texts), (s.anchor, anchors), (s.keep, ["a dog", "a lake", "an object", "a dog"])):
        torch.testing.assert_close(hidden[rows], hidden_states(tiny_pipe, wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden[[s.empty]], hidden_states(tiny_pipe, [""]), rtol=1e-4, atol=1e-4)
    assert len(hidden) == 7  # each text once
    assert not torch.equal(s.forget[0], s.forget[2])  # the same prompt, another seed
    assert sampler.images == 9


def test_with_a_cache_nothing_is_sampled_twice(
    tiny_pipe: StableDiffusionPipeline, sampler: Sampler, tmp_path: Path
) -> None:
    first = collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert sampler.images == 9
    assert len(files) == 5
    assert_equal(collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", tmp_path), first)
    assert sampler.images == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_sampling_that_was_killed_goes_on_where_it_was(
    tiny_pipe: StableDiffusionPipeline, sampler: Sampler, tmp_path: Path
) -> None:
    whole = collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", tmp_path / "whole")
    sampler.chunks, sampler.images, sampler.breaks_after = 0, 0, 3
    with pytest.raises(KeyboardInterrupt):
        collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", tmp_path / "killed")
    assert sampler.images == 5
    sampler.breaks_after = None
    assert_equal(collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", tmp_path / "killed"), whole)
    assert sampler.images == 9


def test_the_batch_size_changes_no_image(tiny_pipe: StableDiffusionPipeline, sampler: Sampler) -> None:
    def sample_set(batch_size: int) -> torch.Tensor:
        knobs = Sampling(sample_steps=2, sample_guidance=3.0, sample_batch_size=batch_size)
        return sampled(tiny_pipe, ["a cat", "a dog", "a cat", ""], [1, 2, 3, 4], knobs, "model", None, "set")

    torch.testing.assert_close(sample_set(1), sample_set(2), rtol=0, atol=1e-5)


def test_without_a_cache_nothing_is_written(
    tiny_pipe: StableDiffusionPipeline, sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", None)
    assert not list(tmp_path.rglob("*"))
    assert_equal(collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", None), first)
    assert sampler.images == 18


DRAW_ONE = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from diffusers import PNDMScheduler
from erase_sd.denoising import samples
from erase_sd.settings import Sampling

def draw(pipe, prompts, seeds, **options):
    return [torch.zeros(1)]

samples.sample = draw
pipe = SimpleNamespace(scheduler=PNDMScheduler.from_pretrained(sys.argv[1]))
print(list(pipe.scheduler.config["_use_default_values"]))
samples.sampled(pipe, ["a cat"], [1], Sampling(), "model", Path(sys.argv[2]), "set")
"""


@pytest.mark.slow
def test_every_process_finds_the_pictures_of_the_others(tmp_path: Path) -> None:
    config = {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_start": 0.00085, "skip_prk_steps": True}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    orders = set()
    for hash_seed in ("1", "2", "3"):
        command = [sys.executable, "-c", DRAW_ONE, str(tmp_path), str(tmp_path / "cache")]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        orders.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(orders) > 1  # or there was nothing to get wrong
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_order_of_left_out_settings_changes_no_key(tiny_pipe: StableDiffusionPipeline) -> None:
    scheduler = tiny_pipe.scheduler
    left_out = ["clip_sample", "set_alpha_to_one", "steps_offset"]  # as diffusers lists them: in the order of a set
    scheduler.register_to_config(_use_default_values=left_out)
    key = json.dumps(scheduler_settings(scheduler))
    scheduler.register_to_config(_use_default_values=list(reversed(left_out)))
    assert json.dumps(scheduler_settings(scheduler)) == key
    scheduler.register_to_config(steps_offset=7)
    assert json.dumps(scheduler_settings(scheduler)) != key


@pytest.mark.parametrize("change", ["model", "prompt", "seed", "steps", "guidance", "scheduler", "settings"])
def test_anything_else_misses_the_cache(
    tiny_pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    count = 0

    def sample(pipe, prompts, seeds, **options):
        nonlocal count
        count += len(prompts)
        return [torch.zeros(4, 8, 8)] * len(prompts)

    def sample_set(prompt="a cat", seed=1, model="model", **knobs):
        sampled(tiny_pipe, [prompt], [seed], Sampling(**{"sample_steps": 2} | knobs), model, tmp_path, "set")

    monkeypatch.setattr(samples, "sample", sample)
    sample_set()
    sample_set(sample_batch_size=1)
    assert count == 1
    if change == "scheduler":
        tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config)
    if change == "settings":
        tiny_pipe.scheduler.register_to_config(prediction_type="v_prediction")
    other = {"model": "other", "prompt": "a dog", "seed": 2}
    knobs = {"steps": {"sample_steps": 3}, "guidance": {"sample_guidance": 4.0}}
    sample_set(**{change: other[change]} if change in other else knobs.get(change, {}))
    assert count == 2


def test_anchors_are_sampled_on_request(tiny_pipe: StableDiffusionPipeline, sampler: Sampler) -> None:
    """Each from the anchor's prompt and the seed of its forget image."""
    s = collect(tiny_pipe, SOURCES, replace(SETTINGS, anchor_pictures=True), 0, "model", None)
    assert s.anchors.shape == s.forget.shape
    assert sampler.images == 9 + 5
    assert not any(torch.equal(z_a, z_f) for z_a, z_f in zip(s.anchors, s.forget, strict=True))


def test_words_only_samples_one_image_of_each_set_and_encodes_every_caption(
    tiny_pipe: StableDiffusionPipeline,
) -> None:
    whole = collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", None)
    few = collect(tiny_pipe, SOURCES, SETTINGS, 0, "model", None, words_only=True)
    torch.testing.assert_close(few.forget, whole.forget[:1], rtol=0, atol=1e-4)  # another batch, other roundings
    torch.testing.assert_close(few.retain, whole.retain[:1], rtol=0, atol=1e-4)
    for name in ("caption", "anchor", "keep", "subject"):
        assert torch.equal(getattr(few, name), getattr(whole, name))
    assert all(torch.equal(x, whole.embeddings[name]) for name, x in few.embeddings.items())
