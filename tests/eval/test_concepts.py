"""eval.concepts: rates counted by hand over scripted answers, the real judge on the pocket model's own pictures."""

import json
import subprocess
import sys
from itertools import product, starmap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_sd.common.errors import UserError
from erase_sd.pocket import oracle
from erase_sd.pocket.score import wilson
from erase_sd.pocket.world import KINDS, Scene, caption
from eval.concepts import main
from eval.images.folder import Entry, ImageFolder, read
from eval.judges.oracle import scenes

ROOT = Path(__file__).parents[2]
OTHER = oracle.OTHER
# what is asked for, and what the judge is made to say
SCRIPT = [
    (Scene("cat", "neon", "red"), ("dog", "neon", "red")),  # forgotten
    (Scene("cat", "flat", "blue"), ("cat", "flat", "blue")),  # not forgotten
    (Scene("cat", None, None), (OTHER, "flat", "white")),  # forgotten, but nothing is there
    (Scene("dog", "neon", "red"), ("dog", "neon", "red")),
    (Scene("dog", "flat", "red"), ("bear", "flat", "red")),  # another animal
    (Scene("bear", "flat", None), ("bear", "neon", OTHER)),  # its style is lost; no background was asked for
    (Scene(None, "pencil", "green"), ("cat", "pencil", "gray")),  # no object was asked for; its background is lost
]


def folder_of(path: Path, script: list, prompts: list[str] | None = None) -> Path:
    path.mkdir()
    rng, lines = np.random.default_rng(len(path.name)), []  # no picture is in two folders
    for row, (scene, _) in enumerate(script):
        file = f"{row:05d}_{row}.png"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path / file)
        prompt = prompts[row] if prompts else caption(scene)
        lines.append(json.dumps({"file": file, "row": row, "prompt": prompt, "seed": row}) + "\n")
    (path / "manifest.jsonl").write_text("".join(lines))
    return path


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder for every script; the judge is made to say what the scripts say, told apart by the pictures' bytes."""
    said: dict[bytes, dict[str, str]] = {}
    monkeypatch.setattr("eval.judges.oracle.name", lambda _, images, size: [said[image.tobytes()] for image in images])

    def make(script: list, name: str = "erased") -> Path:
        folder = folder_of(tmp_path / name, script)
        for entry, (_, answer) in zip(read(folder).entries, script, strict=True):
            said[Image.open(folder / entry.file).convert("RGB").tobytes()] = dict(zip(KINDS, answer, strict=True))
        return folder

    return make


def result(folder: Path) -> dict:
    return json.loads((folder / "concepts.json").read_text())


@pytest.mark.parametrize("batch", ["1", "3", "256"])
def test_rates_by_hand(scripted, batch: str):
    folder = scripted(SCRIPT)
    assert main([str(folder), "--concept", "cat", "--batch_size", batch]) == 0
    found = result(folder)
    assert found["concepts"] == [["object", "cat"]]
    assert (found["n"], found["broken"]) == (7, 0)
    assert found["UA"] == {"value": 2 / 3, "ci95": list(wilson(2 / 3, 3)), "n": 3}
    assert found["IRA"] == {"value": 2 / 3, "ci95": list(wilson(2 / 3, 3)), "n": 3}  # dog, bear and bear
    # styles: all but one flat; backgrounds: all but the green; of six images, the cat's own among them
    assert found["CRA"] == {"value": 9 / 11, "ci95": list(wilson(9 / 11, 6)), "n": 11}
    assert found["other_share"] == 1 / 3
    assert found["before"] is None
    assert found["values"]["00004_4.png"] == {"object": "bear", "style": "flat", "background": "red"}
    assert list(found["values"]) == [entry.file for entry in read(folder).entries]
    assert found["protocol"]["judge_sha256"]


def test_two_concepts_of_two_kinds(scripted):
    folder = scripted(SCRIPT)
    main([str(folder), "--concept", "cat", "neon style", "cat"])
    found = result(folder)
    assert found["concepts"] == [["object", "cat"], ["style", "neon"]]
    # cat: gone, there, gone; neon: there (with the cat), there (with the dog)
    assert (found["UA"]["value"], found["UA"]["n"]) == (2 / 5, 5)
    assert found["UA"]["ci95"] == list(wilson(2 / 5, 4))  # four images
    # dog flat red, bear flat, pencil on green: objects wrong, right; styles right, wrong, right
    assert (found["IRA"]["value"], found["IRA"]["n"]) == (3 / 5, 5)
    assert (found["CRA"]["value"], found["CRA"]["n"]) == (4 / 5, 5)  # backgrounds red, blue, red, red, not green
    assert found["other_share"] == 1 / 5


def test_before_is_the_baseline_by_the_same_rules(scripted):
    perfect = [(scene, tuple(part or "cat" for part in scene)) for scene, _ in SCRIPT]
    folder, original = scripted(SCRIPT), scripted(perfect, "original")
    main([str(folder), "--concept", "cat", "--baseline", str(original)])
    found = result(folder)
    assert {name: rate["value"] for name, rate in found["before"].items()} == {"UA": 0, "IRA": 1, "CRA": 1}
    assert found["UA"]["value"] == 2 / 3
    assert not (original / "concepts.json").exists()


def test_broken_images_are_wrong_everywhere_and_never_forgotten(scripted, capsys: pytest.CaptureFixture):
    folder = scripted(SCRIPT)
    Image.new("RGB", (32, 32)).save(folder / "00000_0.png")  # of the concept, forgotten until now
    (folder / "00003_3.png").write_bytes(b"no image")  # of the others, right until now
    assert main([str(folder), "--concept", "cat"]) == 1
    found = result(folder)
    assert (found["n"], found["broken"]) == (7, 2)
    assert "2 of 7 images" in capsys.readouterr().err
    assert (found["UA"]["value"], found["UA"]["n"]) == (1 / 3, 3)
    assert (found["IRA"]["value"], found["IRA"]["n"]) == (1 / 3, 3)
    assert (found["CRA"]["value"], found["CRA"]["n"]) == (5 / 11, 11)
    assert found["values"]["00003_3.png"] == dict.fromkeys(KINDS, OTHER)
    assert found["other_share"] == 2 / 3


def test_what_no_image_can_tell_is_not_measured(scripted, capsys: pytest.CaptureFixture):
    folder = scripted(SCRIPT[:3])
    main([str(folder), "--concept", "cat"])
    assert result(folder)["IRA"] == {"value": None, "ci95": [0.0, 1.0], "n": 0}
    assert "IRA   not measured" in capsys.readouterr().out


def test_every_caption_is_read_back():
    words = ([*names, None] for names in KINDS.values())
    every = [scene for scene in starmap(Scene, product(*words)) if any(scene)]
    entries = [Entry(file=f"{i}.png", prompt=caption(scene)) for i, scene in enumerate(every)]
    assert len(every) == 21 * 5 * 9 - 1
    assert scenes(ImageFolder(path=Path(), entries=entries, generation={}), [("object", "cat")]) == every


def test_the_pocket_models_own_pictures_are_what_was_asked_for(tmp_path: Path):
    """The whole path without a script: what the embedded model draws, the judge mostly names."""
    from eval.generate import main as generate

    rows = tmp_path / "rows.txt"
    rows.write_text(
        "\n".join(caption(Scene(o, "flat", b)) for o in ("cat", "banana", "fish") for b in ("red", "blue"))
    )
    folder = tmp_path / "gen"
    words = ["--model", "pocket", "--prompts", str(rows), "--output_dir", str(folder), "--steps", "15"]
    assert generate([*words, "--guidance", "3.5"]) == 0
    assert main([str(folder), "--concept", "banana", "--baseline", str(folder)]) == 0
    found = result(folder)
    assert found["UA"]["value"] == 0
    assert found["IRA"]["value"] >= 0.75
    assert found["CRA"]["value"] >= 0.75
    assert found["before"] == {name: found[name] for name in ("UA", "IRA", "CRA")}
    assert found["other_share"] == 0


@pytest.mark.parametrize(
    ("words", "prompts", "sentence"),
    [
        (["--concept", "unicorn"], None, "the pocket model has no concept 'unicorn'"),
        ([], None, "--concept is missing"),
        (["--concept", "cat"], ["a photo of a cat"], "00000_0.png was asked for with 'a photo of a cat', which is no"),
        (["--concept", "cat"], [""], "'', which is no caption"),
        (["--concept", "cat"], [None], "was asked for with no prompt"),
        (["--concept", "snail"], None, "no prompt of .* asks for object snail"),
        (["--concept", "cat", "--baseline", "nowhere"], None, "nowhere is no folder"),
    ],
)
def test_what_cannot_be_judged_says_why(tmp_path: Path, words, prompts, sentence: str):
    folder = folder_of(tmp_path / "x", SCRIPT[:1], prompts)
    with pytest.raises(UserError, match=sentence):
        main([str(folder), *words])
    assert not (folder / "concepts.json").exists()


def test_help_loads_no_slow_library():
    code = (
        "import sys, eval.concepts as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'diffusers', 'matplotlib', 'transformers'} & set(sys.modules), 'slow'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
