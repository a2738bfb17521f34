"""The user's own pictures and prompts: read with captions, used instead of sampled ones, refused in a sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from erase_sd.common.errors import UserError
from erase_sd.denoising import samples
from erase_sd.denoising.concept import resolve
from erase_sd.denoising.own_data import OwnPicture, lines, opened, pictures
from erase_sd.denoising.samples import collect
from erase_sd.models.pipeline import encode_pictures
from erase_sd.plan import make
from erase_sd.settings import Sampling

SETTINGS = Sampling(forget_images=5, retain_images=4, sample_steps=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of noise."""
    place = tmp_path / "mine"
    place.mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / name)
    (place / "notes.md").write_text("not a picture")
    return place


def described(place: Path, *rows: dict) -> None:
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def job(concept: str | tuple[str, ...] = "cat", model: str = "x", **knobs: object):
    return resolve(make(concept=concept, model=model, **knobs).job)


def by_metadata(place: Path) -> None:
    described(place, *({"file_name": f"{x}.png", "text": f"my {x} cat"} for x in "abc"))


def by_files(place: Path) -> None:
    for x in "abc":
        (place / f"{x}.txt").write_text(f"my {x}  cat\n")


def by_list(place: Path) -> None:
    (place / "captions.txt").write_text("my a cat\nmy b cat\nmy c cat\n")


@pytest.mark.parametrize("write", [by_metadata, by_files, by_list])
def test_captions_come_from_any_of_three_places(folder: Path, write: Callable[[Path], None]) -> None:
    write(folder)
    found = pictures(str(folder), "--forget_data")
    assert found == [OwnPicture(folder / f"{x}.png", f"my {x} cat") for x in "abc"]


def test_pictures_without_captions_take_the_concepts_prompts(folder: Path) -> None:
    plain, own = job().sources, job(forget_data=str(folder)).sources
    assert own.forget == plain.forget[:3]
    assert own.forget_pictures == tuple(folder / f"{x}.png" for x in "abc")
    assert own.retain == plain.retain
    assert ": 3 pictures of yours with captions such as" in str(job(forget_data=str(folder)).understood[0])


def test_an_anchor_may_stand_beside_the_caption(folder: Path) -> None:
    described(folder, *({"file_name": f"{x}.png", "text": "my cat", "anchor": "my dog"} for x in "abc"))
    assert {example.anchor for example in job(forget_data=str(folder)).sources.forget} == {"my dog"}


def test_a_picture_is_upright_and_square(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    image.putpixel((20, 10), (255, 0, 0))
    image.save(tmp_path / "x.png")
    square = opened(tmp_path / "x.png")
    assert square.size == (20, 20)
    assert square.getpixel((10, 10)) == (255, 0, 0)


BROKEN = {
    "no folder": (lambda place: place.rename(place.with_name("gone")), "is no folder"),
    "empty": (lambda place: [file.unlink() for file in place.glob("*.png")], "holds no pictures"),
    "no picture": (lambda place: (place / "b.png").write_bytes(b"no"), r"b\.png is no readable picture"),
    "cut": (
        lambda place: (place / "b.png").write_bytes((place / "b.png").read_bytes()[:3000]),
        r"b\.png is no readable picture",
    ),
    "one caption": (
        lambda place: (place / "a.txt").write_text("my cat"),
        r"b\.png has no caption while a\.png has one",
    ),
    "no text": (
        lambda place: described(place, {"file_name": "a.png", "text": "x"}),
        r"metadata\.jsonl has no text for b\.png",
    ),
    "gone": (lambda place: described(place, {"file_name": "d.png", "text": "x"}), r"names d\.png, which is not there"),
    "no json": (
        lambda place: (place / "metadata.jsonl").write_text("x"),
        r"line 1 of .*metadata\.jsonl is no picture's",
    ),
    "a list": (
        lambda place: (place / "metadata.jsonl").write_text("[1]"),
        r"line 1 of .*metadata\.jsonl is no picture's",
    ),
    "few lines": (lambda place: (place / "captions.txt").write_text("x"), r"captions\.txt has 1 lines for 3 pictures"),
    "an empty line": (
        lambda place: (place / "captions.txt").write_text("x\n\ny"),
        r"the caption of .*b\.png is empty",
    ),
    "no UTF-8": (
        lambda place: (place / "captions.txt").write_bytes(b"\xff"),
        r"captions\.txt cannot be read as UTF-8",
    ),
}


@pytest.mark.parametrize(("harm", "message"), BROKEN.values(), ids=BROKEN)
def test_a_folder_that_cannot_be_used_is_one_sentence(folder: Path, harm: Callable, message: str) -> None:
    harm(folder)
    with pytest.raises(UserError, match=message) as error:
        job(forget_data=str(folder))
    assert str(error.value).startswith("--forget_data")
    assert "\n" not in str(error.value)


def test_retain_pictures_need_captions_of_their_own(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--retain_data: .*a\.png has no caption"):
        job(retain_data=str(folder))


def test_retain_captions_that_name_the_concept_are_left_out(folder: Path, tmp_path: Path) -> None:
    described(
        folder,
        *({"file_name": f"{x}.png", "text": t} for x, t in zip("abc", ("a dog", "two cats", "a hat"), strict=True)),
    )
    sources = job(retain_data=str(folder)).sources
    assert sources.retain == ["a dog", "a hat"]
    assert sources.retain_pictures == (folder / "a.png", folder / "c.png")
    (tmp_path / "keep.txt").write_text("a dog\n\na cat\na hat\na dog\n")
    assert job(retain_prompts=str(tmp_path / "keep.txt")).sources.retain == ["a dog", "a hat"]
    (tmp_path / "keep.txt").write_text("a cat\n")
    with pytest.raises(UserError, match=r"--retain_prompts .* names the concept in every caption"):
        job(retain_prompts=str(tmp_path / "keep.txt"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("keep.txt", None, "does not exist"),
        ("keep.txt", "\n\n", "holds no prompts"),
        ("keep.doc", "a dog", "is no .txt or .csv"),
        ("keep.csv", "a,b\n1,2\n", "keep.csv"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        lines(str(tmp_path / name), "--retain_prompts")


def test_prompts_of_a_table_are_read(tmp_path: Path) -> None:
    (tmp_path / "keep.csv").write_text("prompt,seed\na dog,1\na hat,2\n")
    assert lines(str(tmp_path / "keep.csv"), "--retain_prompts") == ["a dog", "a hat"]


def test_what_contradicts_itself_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="--retain_prompts and --retain_data both"):
        make(concept="cat", retain_prompts="a", retain_data="b")
    with pytest.raises(UserError, match="is of one concept"):
        job(("cat", "dog"), forget_data=str(folder))


def test_own_pictures_are_encoded_and_nothing_is_sampled_in_their_place(
    folder: Path, tiny_pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_metadata(folder)
    drawn: list[str] = []
    sample = samples.sample

    def counted(pipe, texts, *args, **options):
        drawn.extend(texts)
        return sample(pipe, texts, *args, **options)

    monkeypatch.setattr(samples, "sample", counted)
    sources = job(forget_data=str(folder)).sources
    s = collect(tiny_pipe, sources, SETTINGS, 0, "model", tmp_path / "cache")
    assert s.forget.shape == (3, 4, 8, 8)
    assert len(drawn) == 4, "the retain set alone is sampled"
    images = [opened(folder / f"{x}.png") for x in "abc"]
    torch.testing.assert_close(s.forget, torch.stack(encode_pictures(tiny_pipe, images)))
    assert len(set(s.caption.tolist())) == 3
    again = collect(tiny_pipe, sources, SETTINGS, 0, "model", tmp_path / "cache")
    assert torch.equal(again.forget, s.forget)
    assert len(drawn) == 4


def test_another_picture_of_the_same_name_is_no_cache_hit(
    folder: Path, tiny_pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    sources = job(forget_data=str(folder)).sources
    first = collect(tiny_pipe, sources, SETTINGS, 0, "model", tmp_path / "cache")
    Image.new("RGB", (64, 64), (9, 99, 200)).save(folder / "b.png")
    second = collect(tiny_pipe, sources, SETTINGS, 0, "model", tmp_path / "cache")
    assert torch.equal(second.forget[0], first.forget[0])
    assert not torch.equal(second.forget[1], first.forget[1])


def test_changed_data_are_another_run(folder: Path) -> None:
    before = job(forget_data=str(folder)).sources.identity()
    assert job(forget_data=str(folder)).sources.identity() == before
    Image.new("RGB", (64, 64), (9, 99, 200)).save(folder / "b.png")
    assert job(forget_data=str(folder)).sources.identity() != before


def test_without_own_data_a_job_is_what_it_was() -> None:
    assert not {"forget_data", "retain_prompts", "retain_data"} & make(concept="cat").config().keys()
    assert make(concept="cat", retain_prompts="x.txt").config()["retain_prompts"] == "x.txt"


@torch.no_grad()
def test_a_latent_of_a_picture_decodes_to_it(tiny_pipe: StableDiffusionPipeline) -> None:
    """In the scale that `sample` and the VAE's decoder share: of the same picture twice, and of another."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (z,) = encode_pictures(tiny_pipe, [image])
    pixels = tiny_pipe.image_processor.preprocess(image)
    code = tiny_pipe.vae.encode(pixels).latent_dist.mean[0]
    torch.testing.assert_close(z / tiny_pipe.vae.config.scaling_factor, code)
