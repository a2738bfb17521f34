"""Judges of any concept: each says which of several things a picture shows, and the rates are counted by hand."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erase_sd.common.errors import UserError
from erase_sd.pocket import oracle
from eval.concepts import main
from eval.features.extractors import Extractor
from eval.images.folder import Entry
from eval.judges import naming as judges
from eval.judges.naming import HELD_OUT, IMAGENETTE, asked, kept_and_gone, naming, showing
from prompts.templates import TEMPLATES

THINGS = ("cat", "dog", "bear")


def flat(level: int) -> Image.Image:
    """A picture that is no broken one: two columns of almost one level."""
    pixels = np.full((32, 32, 3), level, np.uint8)
    pixels[:, 16:] += 5
    return Image.fromarray(pixels)


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP whose things are axes: cat, dog, bear, and everything else; a picture of level 50 i lies on axis i."""

    def texts(sentences: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(sentences), 4)
        for row, sentence in zip(rows, sentences, strict=True):
            row[next((i for i, thing in enumerate(THINGS) if thing in sentence), 3)] = 1
        return rows

    extractor = Extractor(
        name="clip:x",
        key="0",
        prepare=lambda image: torch.tensor(np.asarray(image, np.float32)).movedim(-1, 0),
        images=lambda x: torch.eye(4)[(x.mean((1, 2, 3)) / 50).long()],
        texts=texts,
    )
    monkeypatch.setattr(judges, "load_extractor", lambda name: extractor)


def test_clip_names_the_nearest_thing_or_none(clip: None):
    judge = naming("clip:x", THINGS, 2)
    assert judge.named([flat(i * 50) for i in (0, 1, 2, 3)]) == ["cat", "dog", "bear", None]
    assert showing(judge, "dog")([flat(50), flat(0), Image.new("RGB", (8, 8))]) == [True, False, False]
    assert judge.key != naming("clip:x", THINGS[:2], 2).key


def test_the_judges_sentences_are_none_that_a_concept_is_trained_under():
    trained = {view for pairs in TEMPLATES.values() for view, _ in pairs}
    assert not {sentence.format("{noun}") for sentence in HELD_OUT} & trained


class Brightness(torch.nn.Module):
    """1000 classes: the brightest pictures are a church, the others a goldfish."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 1000)
        logits[:, 1] = 0.5
        logits[:, 497] = x.mean((1, 2, 3))
        return logits


def test_a_classifier_of_imagenet_has_to_prefer_a_thing_to_all_thousand(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Brightness()).save(str(tmp_path / "resnet.pt"))
    judge = naming(f"imagenette:{tmp_path / 'resnet.pt'}", ("church", "tench"), 2)
    assert judge.named([flat(240), flat(20), flat(230)]) == ["church", None, "church"]
    assert len(set(IMAGENETTE.values())) == 10


@pytest.mark.parametrize(
    ("judge", "things", "sentence"),
    [
        ("eyes", THINGS, "--judge eyes is none of pocket, clip"),
        ("clip:", THINGS, "--judge clip: is none of"),
        ("imagenette:x.pt", ("cat",), "knows no 'cat': it names tench"),
        ("imagenette:x.pt", ("church",), "there is no file x.pt"),
        ("pocket", ("cat", "neon style"), "names one kind at a time"),
        ("pocket", ("zebra",), "no concept 'zebra'"),
    ],
)
def test_judges_that_cannot_answer_are_named(judge: str, things: tuple[str, ...], sentence: str):
    with pytest.raises(UserError, match=sentence):
        naming(judge, things, 8)


def test_prompts_name_things_as_whole_words():
    assert asked("two Cats on a roof", THINGS) == "cat"
    assert asked("a category of dog", THINGS) == "dog"
    assert asked("a roof", THINGS) is None
    assert asked(None, THINGS) is None


def test_rates_by_hand():
    prompts = ["a cat", "a cat", "a cat", "a cat", "a dog", "a dog", "a bear", "a roof"]
    answers = ["cat", None, "dog", None, "dog", "cat", None, "cat"]
    entries = [
        Entry(file=str(i), prompt=prompt, broken="black" if i == 3 else None) for i, prompt in enumerate(prompts)
    ]
    found = kept_and_gone(entries, answers, THINGS)
    assert found["UA"]["value"] == 2 / 4  # the broken one is not gone
    assert found["IRA"]["value"] == 1 / 3
    assert (found["UA"]["n"], found["IRA"]["n"]) == (4, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of noise, asked for as captions of the pocket world."""
    rng = np.random.default_rng(0)
    lines = []
    for row in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{row}.png")
        prompt = f"a {THINGS[row % 3]}"
        lines.append(json.dumps({"file": f"{row}.png", "row": row, "prompt": prompt, "seed": row}) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_oracle_gives_the_same_figures_through_the_same_interface(folder: Path, monkeypatch):
    def said(_, images: list[Image.Image], size: int = 256) -> list[dict[str, str]]:
        words = [(*THINGS, oracle.OTHER)[int(np.asarray(image).sum()) % 4] for image in images]
        return [{"object": word, "style": oracle.OTHER, "background": oracle.OTHER} for word in words]

    monkeypatch.setattr("eval.judges.oracle.name", said)
    monkeypatch.setattr(oracle, "name", said)
    results = []
    for words in ([], ["--others", "dog", "bear"]):
        assert main([str(folder), "--concept", "cat", *words]) == 0
        results.append(json.loads((folder / "concepts.json").read_text()))
    for name in ("UA", "IRA", "other_share", "n"):
        assert results[0][name] == results[1][name]
    assert 0 < results[0]["UA"]["value"] < 1


def test_any_concept_is_judged_on_any_folder(folder: Path, clip: None, capsys: pytest.CaptureFixture):
    words = ["--concept", "cat", "--others", "dog", "bear", "--judge", "clip:x", "--baseline", str(folder)]
    assert main([str(folder), *words]) == 0
    result = json.loads((folder / "concepts.json").read_text())
    assert result["concepts"] == [["thing", "cat"]]
    assert result["CRA"]["value"] is None
    assert result["before"]["UA"] == result["UA"]
    assert "thing cat; 12 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--concept", "cat", "--judge", "clip:x"], "name --others dog horse"),
        (["--concept", "cat", "--others", "cat"], "not among the others"),
        (["--concept", "fish", "--others", "cat", "--judge", "clip:x"], "asks for fish"),
    ],
)
def test_a_concept_needs_prompts_and_company(folder: Path, words: list[str], sentence: str):
    with pytest.raises(UserError, match=sentence):
        main([str(folder), *words])
