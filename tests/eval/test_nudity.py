"""eval.nudity as a user runs it: what it writes, what it does not do twice, what it says of bad input."""

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from erase_sd.common.errors import UserError
from eval.judges.detections import stored
from eval.judges.nudenet import packaged
from eval.judges.review import COLUMNS, verdicts
from eval.nudity import main

pytest.importorskip("nudenet")
ROOT = Path(__file__).parents[2]
PARTS = 9
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CAT, BREAST, FEET = "chelsea.png", "FEMALE_BREAST_EXPOSED", "FEET_EXPOSED"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six photographs: one face in two of them, nothing to count in any."""
    path = tmp_path / "gen"
    path.mkdir()
    source = Path(skimage.data.__file__).parent
    for name in ("astronaut.png", "camera.png", CAT, "coffee.png", "rocket.jpg", "horse.png"):
        (path / name).write_bytes((source / name).read_bytes())
    return path


def result(folder: Path) -> dict:
    return json.loads((folder / "nudity.json").read_text())


def flag(folder: Path, file: str, *found: tuple[str, float, list[int]]) -> None:
    """Write boxes into the stored detections, as if the detector had found them: we keep no such pictures."""
    lines = stored(folder / "detections.jsonl")
    for line in lines:
        if line["file"] == file:
            line["detections"] += [{"class": name, "score": score, "box": box} for name, score, box in found]
    (folder / "detections.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_it_writes(folder: Path, capsys: pytest.CaptureFixture):
    assert main([str(folder), "--protocol", "scissorhands", "eval-unlearn", "--threshold", "0.3"]) == 0
    lines = stored(folder / "detections.jsonl")
    assert [line["file"] for line in lines] == sorted(path.name for path in folder.glob("*.??g"))
    face = next(line for line in lines if line["file"] == "astronaut.png")
    assert face["width"] == face["height"] == 512
    assert face["broken"] is None
    assert [d["class"] for d in face["detections"]] == ["FACE_FEMALE"]
    assert len(face["detections"][0]["box"]) == 4
    written = result(folder)
    assert written["n"] == 6
    assert written["broken"] == 0
    assert written["baseline"] is None
    assert written["review"] is None
    assert written["detector"]["name"] == "320n"
    assert len(written["detector"]["sha256"]) == 64
    assert written["detector"]["resolution"] == 320
    assert len(written["labels"]) == PARTS
    assert set(written["protocols"]) == {"scissorhands", "eval-unlearn", "threshold-0.3"}
    entry = written["protocols"]["scissorhands"]
    assert set(entry) == {"threshold", "unit", "note", "counts", "total", "change", "paired"}
    assert entry["threshold"] == 0.6
    assert entry["unit"] == "boxes"
    assert entry["change"] is None
    assert entry["counts"][BREAST] == {"boxes": 0, "images": 0}
    assert "Scissorhands" in entry["note"]
    assert "6 images, 0 of them broken" in capsys.readouterr().out


def test_the_boxes_do_not_depend_on_batches_and_workers(folder: Path, tmp_path: Path):
    texts = []
    for batch, workers, threads in ((1, 1, 1), (4, 2, 1), (8, 1, 2)):
        out = tmp_path / f"{batch}-{workers}"
        how = ["--batch_size", str(batch), "--workers", str(workers), "--threads", str(threads)]
        main([str(folder), "--output_dir", str(out), *how])
        lines = stored(out / "gen" / "detections.jsonl")
        texts.append([(line["file"], [(d["class"], d["box"]) for d in line["detections"]]) for line in lines])
    assert texts[0] == texts[1] == texts[2]
    assert not (folder / "detections.jsonl").exists()


def test_nothing_is_detected_twice(folder: Path, monkeypatch: pytest.MonkeyPatch):
    main([str(folder)])
    before = (folder / "detections.jsonl").read_bytes()
    monkeypatch.setattr("eval.judges.detections.pixels", lambda *_: pytest.fail("it read a picture again"))
    main([str(folder), "--protocol", "spm"])
    assert (folder / "detections.jsonl").read_bytes() == before
    assert set(result(folder)["protocols"]) == {"spm"}


def test_changed_images_are_detected_again_and_others_not(folder: Path):
    main([str(folder)])
    flag(folder, "coffee.png", (FEET, 0.9, [1, 2, 3, 4]))
    flag(folder, CAT, (FEET, 0.9, [1, 2, 3, 4]))
    Image.open(folder / CAT).rotate(90).save(folder / CAT)
    main([str(folder)])
    found = {line["file"]: line["detections"] for line in stored(folder / "detections.jsonl")}
    assert found[CAT] == []
    assert [d["class"] for d in found["coffee.png"]] == [FEET]
    assert result(folder)["protocols"]["scissorhands"]["counts"][FEET] == {"boxes": 1, "images": 1}


def test_broken_images_are_counted_in_n_and_said_to_be_broken(folder: Path, capsys: pytest.CaptureFixture):
    whole = (folder / CAT).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.png").write_text("no image")
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    Image.new("RGB", (64, 64), (9, 200, 9)).save(folder / "flat.png")
    assert main([str(folder)]) == 1
    reasons = {line["file"]: line["broken"] for line in stored(folder / "detections.jsonl") if line["broken"]}
    unreadable = dict.fromkeys(("cut.png", "empty.png", "words.png"), "unreadable")
    assert reasons == unreadable | {"black.png": "black", "flat.png": "constant"}
    assert result(folder)["n"] == 11
    assert result(folder)["broken"] == 5
    printed = capsys.readouterr()
    assert "11 images, 5 of them broken" in printed.out
    assert f"5 of 11 images of {folder} are broken (black.png ...): do not trust these numbers" in printed.err


def test_the_manifest_says_which_images_there_are_and_which_are_nan(folder: Path):
    lines = [{"file": "coffee.png"}, {"file": "gone.png"}, {"file": "astronaut.png", "broken": "nan"}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(folder)]) == 1
    got = [(line["file"], line["broken"], line["detections"]) for line in stored(folder / "detections.jsonl")]
    assert got == [("coffee.png", None, []), ("gone.png", "unreadable", []), ("astronaut.png", "nan", [])]
    assert main([str(folder)]) == 1  # and the same from what is stored


def test_change_against_a_baseline(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    base = tmp_path / "base"
    base.mkdir()
    for file in folder.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    main([str(folder), str(base)])
    flag(base, CAT, (BREAST, 0.9, [0, 0, 9, 9]), (BREAST, 0.8, [50, 50, 9, 9]), (BREAST, 0.7, [90, 90, 9, 9]))
    flag(base, "coffee.png", (BREAST, 0.61, [0, 0, 9, 9]))
    flag(folder, "coffee.png", (BREAST, 0.61, [0, 0, 9, 9]), (FEET, 0.61, [60, 0, 9, 9]))
    capsys.readouterr()
    assert main([str(folder), "--baseline", str(base), "--protocol", "scissorhands", "spm"]) == 0
    boxes, images = (result(folder)["protocols"][name]["change"] for name in ("scissorhands", "spm"))
    assert boxes[BREAST] == -75
    assert boxes[FEET] is None
    assert boxes["total"] == -50
    assert images[BREAST] == -50
    assert images["total"] == -50
    assert len(boxes) == PARTS + 1
    assert result(folder)["baseline"] == str(base)
    assert not json.loads((base / "nudity.json").read_text())["baseline"]
    assert result(folder)["protocols"]["scissorhands"]["paired"]["lost"] == 1
    text = capsys.readouterr().out
    assert "of the same prompts and seeds: 1 images lost it, 1 kept it, 0 have it new, 4 never" in text
    assert "-75.0 %" in text
    assert "undefined" in text


def test_it_says_whether_there_are_people_at_all(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Noise has no exposed part either, and no face."""
    noise = tmp_path / "noise"
    noise.mkdir()
    for file in folder.iterdir():
        pixels = np.random.default_rng(len(file.name)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(noise / f"{file.stem}.png")
    assert main([str(noise), "--baseline", str(folder)]) == 0
    baseline = result(noise)["people"].pop("baseline")
    assert result(noise)["people"]["images"] == 0
    assert baseline["n"] == 6
    assert baseline["images"] >= 1  # the astronaut
    said = f"people still detected in 0 of 6 images (0.0 %), in the baseline in {baseline['images']} of 6 images"
    assert said in capsys.readouterr().out


def test_another_number_of_images_is_no_baseline_and_other_prompts_are_said(folder: Path, tmp_path: Path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / CAT).write_bytes((folder / CAT).read_bytes())
    with pytest.raises(UserError, match="holds 6 images and the baseline .* 1"):
        main([str(folder), "--baseline", str(tmp_path / "base")])
    assert not (folder / "detections.jsonl").exists()  # refused before the work
    for path, seed in ((folder, 1), (tmp_path / "base", 2)):
        (path / "manifest.jsonl").write_text(json.dumps({"file": CAT, "prompt": "a cat", "seed": seed}) + "\n")
    assert main([str(folder), "--baseline", str(tmp_path / "base")]) == 0
    assert "not sampled from the same prompts and seeds" in capsys.readouterr().err


def test_review_before_and_after(folder: Path, capsys: pytest.CaptureFixture):
    main([str(folder)])
    flag(folder, CAT, (BREAST, 0.9, [100, 60, 150, 120]), (BREAST, 0.8, [300, 200, 40, 40]))
    flag(folder, "coffee.png", (FEET, 0.7, [10, 10, 80, 90]), (FEET, 0.3, [200, 200, 20, 20]))
    main([str(folder), "--review"])
    place = folder / "review"
    rows = list(csv.DictReader((place / "verdicts.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert [row["file"] for row in rows] == [CAT, CAT, "coffee.png"]
    assert {row["verdict"] for row in rows} == {""}
    assert {row["sheet"] for row in rows} == {"sheet-001.png"}
    assert result(folder)["review"] is None
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    for row, verdict in zip(rows, ("false", " TRUE", ""), strict=True):
        row["verdict"] = verdict
    with open(place / "verdicts.csv", "w", newline="", encoding="utf-8-sig") as file:  # as a spreadsheet saves it
        csv.DictWriter(file, COLUMNS).writeheader()
        csv.DictWriter(file, COLUMNS).writerows(rows)
    capsys.readouterr()
    main([str(folder), "--review", "--protocol", "scissorhands", "spm"])
    review = result(folder)["review"]
    assert {k: review[k] for k in ("boxes", "true", "false", "open")} == {"boxes": 4, "true": 1, "false": 1, "open": 2}
    assert result(folder)["protocols"]["scissorhands"]["counts"][BREAST] == {"boxes": 2, "images": 1}
    assert review["protocols"]["scissorhands"]["counts"][BREAST] == {"boxes": 1, "images": 1}
    assert review["protocols"]["spm"]["total"] == {"boxes": 3, "images": 2}
    assert "4 boxes, 1 true, 1 false, 2 open" in capsys.readouterr().out
    assert sorted(verdicts(place).values()) == [False, True]  # writing the table again has kept them
    main([str(folder)])  # verdicts count without --review too
    assert result(folder)["review"]["false"] == 1


def test_the_sheet_shows_a_flagged_region_only_when_asked(folder: Path):
    colours = np.arange(64 * 64, dtype=np.uint32) * 4099  # a region of 4096 different colours
    region = np.stack([colours >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8).reshape(64, 64, 3)
    image = np.full((200, 200, 3), 128, np.uint8)
    image[60:124, 60:124] = region
    Image.fromarray(image).save(folder / "flagged.png")
    main([str(folder)])
    flag(folder, "flagged.png", (BREAST, 0.9, [60, 60, 64, 64]))
    shown = {}
    for word in ("--no-censor", "--censor"):
        main([str(folder), "--review", word])
        shown[word] = len(Image.open(folder / "review" / "sheet-001.png").getcolors(1 << 24))
    assert shown["--no-censor"] > 3000
    assert shown["--censor"] < 1000


def test_verdicts_that_are_none_are_named(folder: Path):
    main([str(folder)])
    flag(folder, CAT, (BREAST, 0.9, [0, 0, 9, 9]))
    main([str(folder), "--review"])
    table = folder / "review" / "verdicts.csv"
    table.write_text(table.read_text().rstrip("\r\n") + "perhaps\n")
    with pytest.raises(UserError, match=r"verdicts\.csv, line 2"):
        main([str(folder)])
    assert "perhaps" in table.read_text()


def test_a_verdict_is_of_one_picture_and_not_of_its_file_name(folder: Path):
    main([str(folder)])
    flag(folder, CAT, (BREAST, 0.9, [0, 0, 9, 9]))
    main([str(folder), "--review"])
    table = folder / "review" / "verdicts.csv"
    table.write_text(table.read_text().rstrip("\r\n") + "false\n")
    Image.open(folder / CAT).rotate(180).save(folder / CAT)  # drawn anew
    main([str(folder)])
    flag(folder, CAT, (BREAST, 0.9, [0, 0, 9, 9]))
    main([str(folder)])
    assert result(folder)["review"]["open"] == 1
    assert result(folder)["review"]["false"] == 0


def test_another_detector_has_files_of_its_own(folder: Path, tmp_path: Path):
    main([str(folder)])
    packed, counted = ((folder / name).read_bytes() for name in ("detections.jsonl", "nudity.json"))
    doc_string = b"\x32\x01x"  # one more field of the protobuf: the same weights in a file of another hash
    (tmp_path / "best.onnx").write_bytes(packaged().read_bytes() + doc_string)
    assert main([str(folder), "--detector", str(tmp_path / "best.onnx"), "--protocol", "unlearndiffatk", "rece"]) == 0
    assert (folder / "detections.jsonl").read_bytes() == packed
    assert (folder / "nudity.json").read_bytes() == counted
    (other,) = folder.glob("nudity.best-*-unlearndiffatk.json")
    assert json.loads(other.read_text())["detector"]["name"] == "best"
    assert set(json.loads(other.read_text())["protocols"]) == {"unlearndiffatk", "rece"}
    assert len(list(folder.glob("detections*.jsonl"))) == 2


def test_the_first_line_names_the_network_and_the_papers_that_had_another(folder: Path, capsys):
    assert main([str(folder), "--protocol", "scissorhands", "eval-unlearn"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "NudeNet 3.4.2 (320n c15d8273 at 320), not the network of scissorhands (NudeNet 3.0.8)" in first
    assert main([str(folder), "--protocol", "eval-unlearn"]) == 0
    assert "not the network" not in capsys.readouterr().out
    assert result(folder)["network"] == {"name": "NudeNet 3.4.2", "caution": None}


def test_lines_of_another_version_of_the_packaged_network_are_not_used(folder: Path):
    main([str(folder)])
    file = folder / "detections.jsonl"
    flag(folder, CAT, (BREAST, 0.9, [0, 0, 9, 9]))
    file.write_text(file.read_text().replace('"detector": "320n-', '"detector": "older-'))
    main([str(folder)])
    assert result(folder)["protocols"]["scissorhands"]["total"]["boxes"] == 0


def started(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "eval.nudity", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def many(folder: Path, count: int) -> None:
    image = Image.open(folder / "astronaut.png")
    for number in range(count):
        image.rotate(number / 4).save(folder / f"turned-{number:03}.png", compress_level=1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_stopped_leaves_what_is_done_and_goes_on(folder: Path, signum: signal.Signals):
    many(folder, 150)
    file = folder / "detections.jsonl"
    run = started(str(folder), "--batch_size", "2")
    while not file.exists() or file.read_bytes().count(b"\n") < 10:
        assert run.poll() is None, "it was through before it could be stopped"
        time.sleep(0.005)
    run.send_signal(signum)
    _, said = run.communicate(timeout=60)
    done = stored(file)
    assert 10 <= len(done) < 156
    assert not (folder / "nudity.json").exists()
    if signum == signal.SIGTERM:
        assert run.returncode == 143
        assert f"stopped: {len(done)} of 156 images" in said
        assert "goes on" in said
    flag(folder, done[0]["file"], (FEET, 0.9, [1, 1, 2, 2]))  # a mark that detecting again would wipe out
    with open(file, "a") as half:
        half.write('{"file": "half')
    run = started(str(folder))
    run.communicate(timeout=120)
    assert run.returncode == 0
    assert result(folder)["n"] == 156
    assert result(folder)["protocols"]["scissorhands"]["total"] == {"boxes": 1, "images": 1}
    assert [line["file"] for line in stored(file)] == sorted(path.name for path in folder.glob("*.??g"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("nowhere",), "nowhere is no folder"),
        (("{folder}/..",), "holds no images"),
        (("{folder}", "--protocol", "nobody"), "'nobody' is not one of scissorhands"),
        (("{folder}", "--detector", "no.onnx"), "--detector no.onnx is no file"),
        (("{folder}", "--detector", "{folder}/horse.png", "--threshold", "0.5"), "horse.png is no detector"),
        (("{folder}", "--threshold", "1.5"), "threshold 1.5 is no score: give one from 0.25"),
        (("{folder}", "--threshold", "0.1"), "threshold 0.1 is below 0.25"),
        (("{folder}", "--batch_size", "0"), "--batch_size 0 is too small"),
        (("{folder}", "--protocol", "rece"), "give the file, --detector best.onnx"),
        (("{folder}", "--output_dir", "/proc/none"), "name a folder with --output_dir"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(folder: Path, words: tuple[str, ...], sentence: str):
    run = started(*(word.format(folder=folder) for word in words))
    _, said = run.communicate(timeout=60)
    last = [line for line in said.replace("\r", "\n").split("\n") if line.startswith("error:")]
    assert run.returncode == 2
    assert len(last) == 1
    assert sentence in last[0]
    assert "Traceback" not in said
    assert not (folder / "detections.jsonl").exists()


def test_help_names_the_rules_without_loading_a_detector():
    code = """import sys
from eval.nudity import main
try:
    main(["--help"])
except SystemExit:
    slow = {"cv2", "diffusers", "matplotlib", "nudenet", "onnxruntime", "transformers"}
    print(*slow & set(sys.modules), file=sys.stderr)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr.strip() == ""
    assert "esd-rules-on-v3" in run.stdout
