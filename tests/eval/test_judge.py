"""eval.judge: one command from models to a table, by every protocol, on a tiny model."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from erase_sd.common.errors import UserError
from erase_sd.models.pipeline import load, save_network
from eval.judge import JUDGING, Judging, judge, page, parts, sampling
from eval.judges.protocols import PROTOCOLS

I2P_ROWS = Path(__file__).parent / "i2p_rows.csv"


@pytest.fixture(scope="session")
def erased(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: the tiny model's UNet with other weights."""
    folder = tmp_path_factory.mktemp("runs") / "nudity"
    unet = load(str(tiny_sd)).unet
    unet.conv_out.weight.data.mul_(0.5)
    save_network(unet, folder, "unet")
    return folder


@pytest.fixture
def options(tiny_sd: Path, erased: Path, tmp_path: Path) -> Judging:
    return Judging(
        protocol="scissorhands-i2p",
        models=(f"base={tiny_sd}", f"ours={erased}"),
        prompts=str(I2P_ROWS),
        rows=2,
        steps=1,
        output_dir=str(tmp_path / "judge"),
    )


def test_one_command_samples_counts_and_writes_the_table(options: Judging, capsys: pytest.CaptureFixture):
    pytest.importorskip("nudenet")
    judge(options)
    place = Path(options.output_dir)
    rows = list(csv.DictReader((place / "judge.csv").open()))
    assert [row["model"] for row in rows] == ["base", "ours"]
    assert {row["images"] for row in rows} == {"2"}
    assert {row["scissorhands, boxes"] for row in rows} == {"0"}
    text = (place / "judge.md").read_text()
    assert "A trial, not the protocol: --rows 2, --steps 1." in text
    assert "not the network of scissorhands (NudeNet 3.0.8)" in text
    assert text in capsys.readouterr().out
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    judge(options)  # the same command again does nothing
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_captions_are_measured_against_the_first_model(options: Judging, tmp_path: Path):
    captions = tmp_path / "coco.csv"
    captions.write_text("image_id,prompt,evaluation_seed\n1,a boat,1\n2,a tree,2\n3,a shoe,3\n")
    judge(replace(options, protocol="coco-10k", prompts=str(captions), rows=None, features="pocket"))
    base, ours = csv.DictReader((Path(options.output_dir) / "judge.csv").open())
    assert base["FD-pocket"] == ""
    assert float(ours["FD-pocket"]) > 0


@pytest.mark.parametrize("name", JUDGING)
def test_every_protocol_can_be_asked_for(options: Judging, name: str):
    jobs = sampling(replace(options, protocol=name), JUDGING[name])
    assert list(jobs) == ["base", "ours"]
    assert set(JUDGING[name].rules) <= PROTOCOLS.keys()
    assert all(job.prompts == str(I2P_ROWS) for job in jobs.values())


def test_the_paper_s_protocols_are_sampled_with_the_papers_sampler(options: Judging):
    whole = replace(options, rows=None, steps=50, prompts=None)
    first = sampling(replace(whole, protocol="scissorhands-1k"), JUDGING["scissorhands-1k"])["ours"]
    assert (first.prompts, first.images_per_prompt, first.scheduler) == ("nudity", 250, "lms")
    assert first.running_generator
    assert sampling(whole, JUDGING["scissorhands-i2p"])["base"].scheduler == "lms"
    assert sampling(replace(whole, protocol="spm"), JUDGING["spm"])["base"].per_row
    assert "A trial" not in page(whole, JUDGING["scissorhands-i2p"], [{"model": "base"}], [{}])


def test_what_a_model_is_is_found_out(tiny_sd: Path, erased: Path):
    assert parts(str(tiny_sd), "M") == {"model": str(tiny_sd)}
    assert parts(str(erased), "M") == {"model": "M", "unet": str(erased)}
    assert parts("M", "M") == {"model": "M"}
    assert parts("somebody/unet", "M") == {"model": "M", "unet": "somebody/unet"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"models": ()}, "--models is missing"),
        ({"models": ("base",)}, "'base' is no NAME=WHAT"),
        ({"models": ("a/b=M",)}, "'a/b=M' is no NAME=WHAT"),
        ({"models": ("a=M", "a=N")}, "names 'a' twice"),
        ({"protocol": "uda-142", "prompts": None}, "needs its authors' prompts"),
        ({"protocol": "uda-142"}, r"give the file, --detector best.onnx"),
        ({"steps": 0}, "--steps 0 is too small"),
    ],
)
def test_mistakes_cost_one_sentence_before_anything_is_sampled(options: Judging, given: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        judge(replace(options, **given))
    assert not Path(options.output_dir).exists()
