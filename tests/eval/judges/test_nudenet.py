"""Our NudeNet against NudeNet's own: box for box on photographs, in any batch, on any threads.

NUDENET308 names the folder of the unpacked wheel of nudenet 3.0.8, whose network may not be stored here (AGPL-3.0).
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
from PIL import Image, ImageOps

from erase_sd.common.errors import UserError
from eval.images.folder import Entry, ImageFolder, read
from eval.judges.detections import pixels
from eval.judges.nudenet import LABELS, Detector, _boxes, _shrunk, detect, load, packaged
from eval.judges.protocols import NEW, OLD, RECIPES

nudenet = pytest.importorskip("nudenet")
ROOT = Path(__file__).parents[3]
BUNDLED = Path(skimage.data.__file__).parent
FACES = ("astronaut.png", "camera.png")  # NudeNet finds their faces; the others are for what has no box
OTHERS = ("chelsea.png", "coffee.png", "rocket.jpg", "horse.png", "motorcycle_left.png", "retina.jpg", "page.png")


def crops(image: Image.Image) -> dict[str, Image.Image]:
    """Thirteen of one picture: turned, mirrored, cut, stretched, shrunk, enlarged, grey, dark."""
    wide, high = image.size
    return {
        "as-it-is": image,
        "mirrored": ImageOps.mirror(image),
        "turned-7": image.rotate(7),
        "turned-15": image.rotate(-15, expand=True),
        "top": image.crop((0, 0, wide, high * 2 // 3)),
        "middle": image.crop((wide // 8, high // 16, wide * 7 // 8, high * 5 // 6)),
        "left": image.crop((0, 0, wide * 3 // 4, high)),
        "small": image.resize((193, 211)),
        "large": image.resize((901, 877)),
        "wide": image.resize((640, 480)),
        "tall": image.resize((320, 427)),
        "grey": image.convert("L"),
        "dark": image.point(lambda level: level * 2 // 3),
    }


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """Photographs that come with scikit-image and scikit-learn, most of them with a face, as PNG, JPEG and WebP."""
    folder = tmp_path_factory.mktemp("photographs")
    kinds = [("png", {}), ("jpg", {"quality": 88}), ("webp", {"quality": 90})]
    for name in FACES:
        for number, (change, image) in enumerate(crops(Image.open(BUNDLED / name).convert("RGB")).items()):
            for shift in (0, 1):
                suffix, how = kinds[(number + shift) % 3]
                image.save(folder / f"{Path(name).stem}-{change}.{suffix}", **how)
    for name in OTHERS:
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    for number, image in enumerate(sklearn.datasets.load_sample_images().images):
        Image.fromarray(image).save(folder / f"sample-{number}.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown a quarter clockwise
    Image.open(BUNDLED / "astronaut.png").rotate(90).save(folder / "exif.jpg", exif=turned)
    return read(folder)


@pytest.fixture(scope="session")
def oracle(photographs: ImageFolder) -> dict[str, list[dict]]:
    """What the real NudeDetector answers for every file."""
    theirs = nudenet.NudeDetector()
    return {entry.file: theirs.detect(str(photographs.path / entry.file)) for entry in photographs.entries}


@pytest.fixture(scope="session")
def detector() -> Detector:
    return load()


@pytest.fixture(scope="session")
def old_package() -> Path:
    """The folder `nudenet` of its version 3.0.8."""
    folder = Path(os.environ.get("NUDENET308", "nowhere"), "nudenet")
    if not (folder / "best.onnx").is_file():
        pytest.skip("NUDENET308 names no unpacked wheel (pip download nudenet==3.0.8 --no-deps)")
    return folder


def images(folder: ImageFolder) -> dict[str, np.ndarray]:
    return {entry.file: pixels(folder, entry)[0] for entry in folder.entries}


def same(ours: list[dict], theirs: list[dict]) -> bool:
    pairs = list(zip(ours, theirs, strict=False))
    alike = all(a["class"] == b["class"] and a["box"] == b["box"] for a, b in pairs)
    return len(ours) == len(theirs) and alike and all(abs(a["score"] - b["score"]) <= 1e-5 for a, b in pairs)


def test_there_are_enough_photographs_with_a_box(oracle: dict[str, list[dict]]):
    assert len(oracle) >= 50
    assert sum(bool(found) for found in oracle.values()) >= 30
    assert len({tuple(d["box"]) for found in oracle.values() for d in found}) >= 25
    assert {"FACE_FEMALE", "FACE_MALE"} <= {d["class"] for found in oracle.values() for d in found}


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (1, 8), (2, 5)])
def test_box_for_box_what_nudenet_finds(photographs: ImageFolder, oracle: dict[str, list[dict]], threads, batch):
    mine, files = load(threads=threads), [entry.file for entry in photographs.entries]
    seen = images(photographs)
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        for file, found in zip(part, detect(mine, [seen[file] for file in part]), strict=True):
            assert same(found, oracle[file]), file


def test_box_for_box_what_nudenet_308_finds(photographs: ImageFolder, old_package: Path):
    """Theirs runs from its own file, whichever nudenet is installed."""
    described = importlib.util.spec_from_file_location("nudenet_308", old_package / "nudenet.py")
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    theirs, mine = module.NudeDetector(), load(old_package / "best.onnx")
    assert mine.network == OLD
    boxes = 0
    for file, image in images(photographs).items():
        found = theirs.detect(str(photographs.path / file))
        assert same(detect(mine, [image])[0], found), file
        boxes += len(found)
    assert len(photographs.entries) >= 60
    assert boxes >= 40


@pytest.mark.parametrize(
    ("wide", "high", "first", "last"),
    [
        (640, 480, (40, 0), (279, 319)),  # 320 x 240 with 40 above and below
        (100, 300, (0, 106), (319, 213)),  # 107 wide: 106 before and behind, and one column is stretched to fill
        (50, 50, (0, 0), (319, 319)),
    ],
)
def test_the_old_recipe_puts_the_picture_in_the_middle(detector: Detector, wide, high, first, last):
    white = np.full((high, wide, 3), 255, np.uint8)
    seen = _shrunk(white, replace(detector, recipe=RECIPES["nudenet-3.0"]))[:, :, 0]
    rows, columns = np.nonzero(seen > 127)
    assert seen.shape == (320, 320)
    assert (rows.min(), columns.min()) == first
    assert (rows.max(), columns.max()) == last


def test_the_old_recipe_rounds_boxes_and_lets_them_stick_out(detector: Detector):
    """640 x 480 in the square of 320: a factor of 2, and 40 black lines above. By hand."""
    old = replace(detector, recipe=RECIPES["nudenet-3.0"])
    answer = np.zeros((22, 3), np.float32)
    answer[:4, 0] = (10, 50, 30.4, 20)
    answer[4 + 1, 0] = 0.9
    answer[:4, 1] = (200, 200, 10.25, 20.75)  # corners at 194.875 and 189.625 - 40
    answer[4 + 3, 1] = 0.3
    answer[:4, 2] = (100, 100, 20, 20)
    answer[4 + 3, 2] = 0.25  # dropped
    found = _boxes(answer, 480, 640, old)
    assert [(d["class"], d["box"]) for d in found] == [
        ("FACE_FEMALE", [-10, 0, 61, 40]),
        ("FEMALE_BREAST_EXPOSED", [390, 299, 20, 42]),
    ]


def test_the_installed_network_is_the_one_that_its_name_says(detector: Detector):
    assert detector.network == NEW
    assert detector.recipe == RECIPES["nudenet"]


@pytest.mark.parametrize(("wide", "high"), [(512, 512), (640, 427), (193, 900)])
def test_crowded_answers_become_the_boxes_that_nudenet_makes_of_them(detector: Detector, wide: int, high: int):
    """Hundreds of boxes that overlap, stick out and share scores near the limits, as in no photograph here."""
    draw = np.random.default_rng(wide)
    answer = np.zeros((22, 2100), np.float32)
    answer[:2] = draw.uniform(-40, 360, (2, 2100))
    answer[2:4] = draw.uniform(5, 150, (2, 2100))
    answer[4:] = draw.choice(np.array([0, 0.1, 0.2, 0.25, 0.2500001, 0.3, 0.6, 0.9], np.float32), (18, 2100))
    answer[4:] *= draw.random((18, 2100)) < 0.05
    side = max(wide, high)
    padding, ratios = (side - wide, side - high), (side / wide, side / high)
    theirs = nudenet.nudenet._postprocess([answer[None]], *padding, *ratios, wide, high, 320, 320)
    assert _boxes(answer, high, wide, detector) == theirs
    assert len(theirs) > 50


def test_pixels_are_those_that_nudenet_reads(photographs: ImageFolder):
    import cv2

    for file, image in images(photographs).items():
        assert np.array_equal(image, cv2.imread(str(photographs.path / file))), file


def test_the_order_of_planes_matters_to_the_network(detector: Detector, photographs: ImageFolder):
    """nudenet hands over B, G, R: a loader that "repaired" it would give other scores than everybody's."""
    image = images(photographs)["astronaut-as-it-is.png"]
    (given,), (swapped,) = detect(detector, [image]), detect(detector, [image[:, :, ::-1].copy()])
    assert given != swapped
    unlearndiffatk = load(recipe="unlearndiffatk")  # gives R, G, B, and has the same network here
    (theirs,) = detect(unlearndiffatk, [image[:, :, ::-1].copy()])
    assert [d["box"] for d in theirs] == [d["box"] for d in given if d["score"] > 0.5] != []


def test_unlearndiffatks_recipe_squeezes_and_drops_at_half(photographs: ImageFolder):
    """Their reading by hand: R, G, B, squeezed to the square, one box scaled by each axis of its own."""
    import cv2

    mine, image = load(recipe="unlearndiffatk"), images(photographs)["astronaut-wide.png"]
    small = cv2.resize(image[:, :, ::-1].copy(), (320, 320)).transpose(2, 0, 1)[None] / np.float32(255)
    answer = mine.session.run(None, {"images": small.astype(np.float32)})[0][0]
    anchor = answer[4:].max(0).argmax()
    x, y, w, h = answer[:4, anchor]
    (found, *_) = detect(mine, [image])[0]
    assert found["score"] == pytest.approx(answer[4:, anchor].max(), abs=1e-5)
    assert found["score"] > 0.5
    by_hand = [(x - w / 2) * 640 / 320, (y - h / 2) * 480 / 320, w * 640 / 320, h * 480 / 320]
    assert found["box"] == [int(value) for value in by_hand]
    assert detect(mine, [np.full((64, 64, 3), 90, np.uint8)]) == [[]]


def test_a_file_that_fixes_a_batch_of_one_is_run_one_by_one(detector: Detector, photographs: ImageFolder):
    class Strict:
        """The session, but it takes no more than one image at a time."""

        get_inputs = detector.session.get_inputs

        def run(self, names, feed):
            assert feed["images"].shape[0] == 1
            return detector.session.run(names, feed)

    some = list(images(photographs).values())[:3]
    assert detect(replace(detector, session=Strict(), one_by_one=True), some) == detect(detector, some)


def test_nothing_in_nothing_out(detector: Detector):
    assert detect(detector, []) == []
    assert detect(detector, [np.zeros((1, 1, 3), np.uint8)]) == [[]]


def test_labels_are_what_the_packaged_file_states(detector: Detector):
    assert detector.labels == LABELS
    assert len(LABELS) == 18
    stated = detector.session.get_modelmeta().custom_metadata_map["names"]
    assert all(f"{number}: '{label}'" in stated for number, label in enumerate(LABELS))


def test_keys_tell_files_resolutions_and_recipes_apart(detector: Detector, tmp_path: Path):
    (tmp_path / "640n.onnx").write_bytes(packaged().read_bytes())
    others = [load(tmp_path / "640n.onnx"), load(resolution=640), load(recipe="unlearndiffatk")]
    assert len({detector.key, *(other.key for other in others)}) == 4
    assert load().key == detector.key
    assert others[1].resolution == 640


@pytest.mark.parametrize("content", [b"", b"no network at all", b"\x08\x07"])
def test_a_file_that_is_no_network_is_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "other.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"other\.onnx"):
        load(tmp_path / "other.onnx")


@pytest.mark.parametrize("size", [(100_000, 100_000), (9_000, 9_000)])
def test_a_header_that_claims_too_much_is_unreadable(tmp_path: Path, size: tuple[int, int]):
    """Pillow refuses the first with an error of its own class; the second is beyond what a picture of ours may be."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    folder = ImageFolder(path=tmp_path, entries=[Entry(file="huge.png")], generation={})
    assert pixels(folder, folder.entries[0]) == (None, "unreadable")


def test_only_one_module_imports_nudenet():
    importers = []
    for package in ("erase_sd", "eval", "prompts"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "import nudenet" in text or "from nudenet" in text:
                importers.append(path)
    assert importers == [ROOT / "eval" / "judges" / "nudenet.py"]


def test_without_nudenet_one_sentence_says_how_to_get_it():
    code = (
        "import sys; sys.modules['nudenet'] = None\nfrom eval.nudity import *\nrun_main(lambda: main(['tests/eval']))"
    )
    code = code.replace("tests/eval", str(BUNDLED))
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "erase-sd[eval]" in run.stderr
    assert "AGPL" in run.stderr
    assert run.stderr.count("\n") == 1
