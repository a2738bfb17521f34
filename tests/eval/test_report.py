"""eval.report: everything that was measured is on the page, nothing that anybody typed is more than text."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_sd.common.errors import UserError
from eval.judges.protocols import EXPOSED, NETWORKS, OLD, PROTOCOLS, change, count
from eval.report import main
from eval.reporting.run_sections import _rates

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script> & | `x` ![y](http://evil.example/z.png)"
PROMPTS = ["a red cup", EVIL, "a boat"]
BREAST, BELLY = "FEMALE_BREAST_EXPOSED", "BELLY_EXPOSED"
REGION = [32, 48, 40, 40]
RATE = {"before": 1.0, "after": 0.25}


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]

    def images(self) -> list[np.ndarray]:
        sources = [base64.b64decode(image["src"].partition("base64,")[2]) for image in self.all("img")]
        return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in sources]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two steps, judged."""
    return make_run(tmp_path / "runs" / "a", "neon style")


def make_run(folder: Path, concept: str) -> Path:
    folder.mkdir(parents=True)
    config = {"concept": [concept], "model": "M", "method": "scissorhands", "steps": 2, "lam": 1.0, "strict": False}
    record = {
        "config": config,
        "seed": 7,
        "base": {"model": "M", "hash": "abc"},
        "seconds": 90.0,
        "trace": {"steps": 2},
    }
    (folder / "run.json").write_text(json.dumps(record | {"environment": {"torch": "2.9"}}))
    interval = {"after": [0.1, 0.4]}
    scores = {"concept": RATE | {"other_share": 0.5}, "retain": {"style": RATE}, "n": {"forget": 4, "retain": 8}}
    scores |= {"ci95": {"concept": interval, "retain": {"style": interval}}, "protocol": {"judge": "an oracle"}}
    (folder / "scores.json").write_text(json.dumps(scores))
    for name in ("before_after", "trace", "saliency"):
        Image.new("RGB", (400, 90), (10, 90, 90)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def folders(drawn, run: Path) -> list[str]:
    """I2P of the original model and of two runs: a breast goes from 2 to 1, a belly from 0 to 1, the rest is 0."""
    found = {
        "sd": {0: [(BREAST, 0.9, REGION)], 1: [(BREAST, 0.8, REGION)]},
        "a": {1: [(BREAST, 0.7, REGION)], 2: [(BELLY, 0.95, REGION)]},
        "b": {0: [(BREAST, 0.55, REGION)]},
    }
    paths = [
        drawn(name, PROMPTS, boxes, weights=None if name == "sd" else f"runs/{name}") for name, boxes in found.items()
    ]
    for path in paths:
        judge(path, paths[0])
    return [str(path) for path in paths]


def judge(folder: Path, baseline: Path) -> None:
    """nudity.json, as eval.nudity writes it."""
    rule = PROTOCOLS["scissorhands"]
    counts, before = (
        count([json.loads(line) for line in (path / "detections.jsonl").read_text().splitlines()], rule)
        for path in (folder, baseline)
    )
    rules = (
        {"threshold": 0.6, "unit": "boxes", "note": rule.note} | counts | {"change": change(counts, before, "boxes")}
    )
    network = {"name": "net.onnx", "sha256": "def", "resolution": 320}
    result = {"n": 3, "broken": 0, "detector": network, "labels": EXPOSED, "protocols": {"scissorhands": rules}}
    (folder / "nudity.json").write_text(json.dumps(result | {"baseline": str(baseline), "review": None}))


def report(tmp_path: Path, *words: str | Path) -> Page:
    assert main([*map(str, words), "--output_dir", str(tmp_path / "report")]) == 0
    return Page(tmp_path / "report" / "report.html")


def test_one_run_alone_says_what_makes_the_rest(run: Path, tmp_path: Path):
    page = report(tmp_path, run)
    assert "neon style erased from M" in page.text
    assert "a by scissorhands, 2 steps, 1.5 minutes" in page.text
    assert "prompts with the concept: it is seen lower 100.0 25.0 10.0 to 40.0" in page.text
    assert "other prompts: the right style is seen higher 100.0 25.0 10.0 to 40.0" in page.text
    assert len(page.images()) == 3
    assert "environment: torch 2.9" in page.text
    assert "judge: an oracle" in page.text
    for command in (
        "eval.grid --prompts i2p",
        "eval.generate --prompts nudity --images_per_prompt 250 --scheduler lms",
        "eval.quality",
        "eval.nudity",
    ):
        assert command in page.text
    keys = {section["id"] for section in page.all("section")}
    assert keys == {link["href"][1:] for link in page.all("a")}
    assert len(keys) == 10


def test_each_of_several_concepts_has_a_row():
    rate = {"before": 1.0, "after": 0.5, "other_share": 0.1, "n": 4}
    found = {"concept": rate, "concepts": {"cat": rate, "neon style": rate | {"after": 1.0}}}
    found["ci95"] = {"concepts": {"cat": {"after": [0.2, 0.8]}}}
    assert _rates(found)[1:] == [
        ["prompts with cat: it is seen", "lower", "100.0", "50.0", "20.0 to 80.0"],
        ["prompts with neon style: it is seen", "lower", "100.0", "100.0", ""],
    ]


def test_an_empty_prompt_is_said_to_be_empty(run: Path, drawn, tmp_path: Path):
    page = report(tmp_path, run, "--images", drawn("cups", ["", "a boat"], source="cups"))
    assert "(empty prompt) seed 7" in page.text
    assert "cups: the first 2 images, none of which asks for what was erased" in page.text
    assert "00000_7.png" not in page.text


def test_what_a_run_lacks_is_named(run: Path, tmp_path: Path):
    for name in ("scores.json", "trace.png", "saliency.png", "before_after.png"):
        (run / name).unlink()
    text = report(tmp_path, run).text
    assert "a was not judged" in text
    assert "erase-sd --model M --concept 'neon style'" in text
    assert all(f"a has no {name}.png" in text for name in ("trace", "saliency", "before_after"))


def test_nothing_typed_is_more_than_text(tmp_path: Path, folders: list[str]):
    page = report(tmp_path, make_run(tmp_path / "runs" / "<i>b", EVIL), "--images", *folders)
    assert not page.all("script")
    assert not page.all("i")
    assert EVIL in page.text
    assert "<i>b by scissorhands" in page.text
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "<script" not in markdown
    assert "<i>" not in markdown
    assert "![y]" not in markdown
    assert "`x`" not in markdown
    assert "&#60;script&#62;" in markdown


def test_the_page_needs_no_network(run: Path, tmp_path: Path, folders: list[str]):
    page = report(tmp_path, run, "--images", *folders)
    links = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "action", "data") if key in a]
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    source = (tmp_path / "report" / "report.html").read_text()
    assert "url(" not in source
    assert "@import" not in source
    assert all("alt" in image and int(image["width"]) > 0 for image in page.all("img"))
    markdown = (tmp_path / "report" / "report.md").read_text()
    pictures = re.findall(r"\]\(<(images/[^>]+)>\)", markdown)
    assert len(pictures) == len(page.all("img"))
    assert all((tmp_path / "report" / name).is_file() for name in pictures)


def test_fig_3_with_undefined_changes(run: Path, tmp_path: Path, folders: list[str]):
    text = report(tmp_path, run, "--images", *folders).text
    minus = "\N{MINUS SIGN}"
    assert "part M a change b change" in text
    assert f"Female breast 2 1 {minus}50.0 % 0 {minus}100.0 %" in text
    assert "Belly 0 1 undefined 0 undefined" in text
    assert f"Total 2 2 0 % 0 {minus}100.0 %" in text
    assert "No images of the 1K set (--prompts nudity) were given" in text


def test_fig_3_draws_undefined_as_a_word(folders: list[str]):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from eval.reporting import figure as figures
    from eval.reporting import inputs as evidence

    drawn, show = [], Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), show(figure, *a, **k)))
        baseline, *models = evidence.images(tuple(folders), True)
        figures.fig3("x", "I2P", figures.panel(baseline, models))
    words = [text.get_text() for text in drawn[0].findobj(Text)]
    assert words.count("undefined") == 2 * 8
    assert "0 %" in words
    assert "Female breast (2)" in words
    assert "Belly (0)" in words


def test_side_by_side_shows_the_concept_and_the_rest_the_worst_first(run: Path, drawn, tmp_path: Path):
    prompts = [f"cup {row}" for row in range(8)] + [f"a neon style cup {row}" for row in range(8)]
    folders = [drawn("sd", prompts, source="pocket"), drawn("a", prompts, weights="runs/a", source="pocket")]
    files = [f"{row:05d}_{row + 7}.png" for row in range(16)]
    rate = {"value": 0.5, "ci95": [0.2, 0.8], "n": 2}
    seen = {"concepts": [["style", "neon"]], "UA": rate, "IRA": rate, "CRA": rate, "n": 16, "broken": 0}
    values = {file: {"style": "neon" if file == files[13] else "flat"} for file in files}
    (folders[1] / "concepts.json").write_text(json.dumps(seen | {"values": values, "protocol": {}}))
    drift = {"name": "drift", "value": 1.0, "unit": "", "higher_is_better": False, "n": 16, "features": "f"}
    drift |= {"against": "sd", "values": [float(row == 5) for row in range(16)], "protocol": {"files": files}}
    (folders[1] / "quality.json").write_text(json.dumps({"metrics": [drift], "n": 16, "broken": 0}))
    text = report(tmp_path, run, "--images", *folders).text
    assert "4 images of the concept, what shows most of it first, and 4 of the rest, what moved furthest first" in text
    order = ["a neon style cup 5", "a neon style cup 0", "a neon style cup 1", "a neon style cup 2", "cup 5", "cup 0"]
    places = [re.search(rf"(?<!style ){prompt} seed", text).start() for prompt in order]
    assert places == sorted(places)
    assert "a neon style cup 3 seed" not in text


def test_counts_on_another_network_than_the_papers_say_so(run: Path, tmp_path: Path, folders: list[str]):
    warning = "not the network of scissorhands (NudeNet 3.0.8)"
    assert warning in report(tmp_path, run, "--images", *folders).text
    for folder in map(Path, folders):
        result = json.loads((folder / "nudity.json").read_text())
        sha256 = NETWORKS[OLD].sha256
        result["detector"]["sha256"] = sha256
        (folder / f"nudity.best-{sha256[:16]}-320-nudenet-3.0.json").write_text(json.dumps(result))
    assert warning not in report(tmp_path, run, "--images", *folders).text


def test_worst_images_come_highest_score_first(run: Path, tmp_path: Path, folders: list[str]):
    text = report(tmp_path, run, "--images", *folders).text
    assert "a: 2 of 3 images on which" in text
    assert "b: 1 of 3 images on which" in text
    assert text.index("Belly 0.95") < text.index("Female breast 0.70") < text.index("Female breast 0.55")


def test_pocket_images_in_which_the_judge_sees_the_concept(run: Path, drawn, tmp_path: Path):
    folder = drawn("a", PROMPTS, weights="runs/a", source="pocket")
    values = {
        f"{row:05d}_{row + 7}.png": {"object": "cup", "style": style} for row, style in enumerate(["neon", "flat"])
    }
    rate = {"value": 0.5, "ci95": [0.2, 0.8], "n": 2}
    result = {
        "concepts": [["style", "neon"]],
        "UA": rate,
        "IRA": rate,
        "CRA": rate | {"value": None},
        "n": 3,
        "broken": 0,
    }
    (folder / "concepts.json").write_text(json.dumps(result | {"values": values, "before": None, "protocol": {}}))
    page = report(tmp_path, run, "--images", folder)
    assert "a: 1 of 3 images in which the judge still sees the concept" in page.text
    assert "sees neon (style)" in page.text
    assert "neon (style) 0.500 (0.200 to 0.800)" in page.text
    assert "not measured" in page.text


def test_quality_says_which_way_is_better_and_what_was_broken(run: Path, tmp_path: Path, folders: list[str]):
    entry = {"name": "fid", "value": 31.5, "unit": "", "higher_is_better": False, "n": [3, 2], "features": "f"}
    result = {"metrics": [entry | {"against": "gen/sd", "protocol": {"images": "0"}}], "n": 3, "broken": 1}
    Path(folders[1], "quality.json").write_text(json.dumps(result))
    text = report(tmp_path, run, "--images", *folders).text
    assert "a fid f gen/sd lower 31.5 3 and 2" in text
    assert "a: 1 of 3 images broken" in text
    assert "b: not measured;" in text


def clear_pieces(pages: list[np.ndarray], folder: str, file: str) -> int:
    """How many 8 x 8 pieces of the flagged region can be recognised: JPEG moves no pixel by more than a few levels."""
    x, y, w, h = REGION
    region = np.asarray(Image.open(Path(folder, file)), dtype=int)[y : y + h, x : x + w]
    same = [page[y : y + h, x : x + w].astype(int) - region for page in pages if page.shape == (128, 128, 3)]
    assert same, "no picture of the page has the size of the images"
    tiles = [abs(gap[i : i + 8, j : j + 8]).mean() for gap in same for i in range(0, h, 8) for j in range(0, w, 8)]
    return sum(tile < 20 for tile in tiles)


def test_no_flagged_region_is_on_the_page_unless_asked_for(run: Path, tmp_path: Path, folders: list[str]):
    page = report(tmp_path, run, "--images", *folders)
    files = [(folders[0], "00000_7.png"), (folders[1], "00002_9.png"), (folders[2], "00000_7.png")]
    assert [clear_pieces(page.images(), *file) for file in files] == [0, 0, 0]
    assert "Exposed regions are pixelated" in page.text
    page = report(tmp_path, run, "--images", *folders, "--no-censor")
    assert all(clear_pieces(page.images(), *file) >= 25 for file in files)
    assert "Images are not censored" in page.text


def test_no_clear_picture_of_an_earlier_report_stays(run: Path, tmp_path: Path, folders: list[str]):
    place = tmp_path / "report"
    main([str(run), "--images", *folders, "--no-censor", "--output_dir", str(place)])
    (place / "images" / "earlier.png").write_bytes(b"clear")
    main([str(run), "--output_dir", str(place)])
    text = (place / "report.md").read_text()
    assert all(picture.name in text for picture in (place / "images").iterdir())


def test_a_folder_of_the_user_s_pictures_is_left_alone(run: Path, tmp_path: Path):
    (tmp_path / "mine" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="of something else: name another"):
        main([str(run), "--output_dir", str(tmp_path / "mine")])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["images"]


def test_one_run_on_two_sources_is_told_apart_by_the_source(run: Path, tmp_path: Path, folders: list[str], drawn):
    for name, row in (("sd-1k", 0), ("a-1k", 2)):
        path = drawn(
            name, PROMPTS, {row: [(BREAST, 0.9, REGION)]}, weights=name == "a-1k" and "runs/a", source="nudity"
        )
        folders.append(str(path))
        judge(path, Path(folders[3]))
    page = report(tmp_path, run, "--images", *folders)
    assert "part M a change Female breast 1 1 0 %" in page.text
    assert "part M a change b change" in page.text
    assert "a, nudity: 1 of 3 images" in page.text
    assert "a, i2p: 2 of 3 images" in page.text
    assert [image["alt"] for image in page.all("img") if "in total" in image["alt"]] == [
        "the 1K set: in total a 0 %",
        "I2P: in total a 0 %, b \N{MINUS SIGN}100.0 %",
    ]


def test_counts_of_different_detectors_are_not_compared(run: Path, tmp_path: Path, folders: list[str]):
    file = Path(folders[1], "nudity.json")
    file.write_text(file.read_text().replace('"resolution": 320', '"resolution": 640'))
    with pytest.raises(UserError, match="judged by different detectors"):
        report(tmp_path, run, "--images", *folders)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda run, folder: (run / "run.json").unlink(), "holds no finished run"),
        (lambda run, folder: (run / "run.json").write_text("{"), "is damaged"),
        (lambda run, folder: (run / "trace.png").write_text("no"), "is no PNG"),
        (lambda run, folder: (folder / "generation.json").unlink(), "has no generation.json"),
        (lambda run, folder: (folder / "nudity.json").write_text("{}"), "lacks broken, detector, n, protocols"),
    ],
)
def test_damaged_input_is_named(run: Path, folders: list[str], tmp_path: Path, break_it, sentence: str):
    break_it(run, Path(folders[1]))
    with pytest.raises(UserError, match=sentence):
        report(tmp_path, run, "--images", *folders)
    assert not (tmp_path / "report").exists()


def test_bad_input_is_one_sentence_and_code_2(tmp_path: Path):
    command = [sys.executable, "-m", "eval.report", "nowhere", "--output_dir", str(tmp_path / "report")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere is no folder")
    assert done.stderr.count("\n") == 1
