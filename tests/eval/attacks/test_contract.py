"""What every attack of the registry keeps to, on a toy pipeline: it runs to its end, says what it did, and resumes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from erase_sd.common.errors import UserError
from eval import attack as command
from eval.attacks import ATTACKS, BUDGETS, OWN, PLAIN, attack
from eval.attacks.base import EVERY, AttackJudge, ConceptAttack
from eval.attacks.published import PublishedPrompts
from eval.attacks.runner import AttackFolder
from tests.eval.attacks.conftest import BRIGHT, CONCEPT, TARGETS

ROOT = Path(__file__).parents[3]
QUICK = {
    "ring-a-bell": {"population": 6, "generations": 2, "length": 4},
    "unlearndiffatk": {"timesteps": 2, "iterations": 1, "tokens": 2},
    "p4d-n": {"steps": 2, "picture_every": 1, "free": 4},
    "p4d-k": {"steps": 2, "picture_every": 1},
    "concept-inversion": {"steps": 2, "batch_size": 2, "pictures": 3, "vectors": 2},
    "tina": {"timesteps": 2, "steps": 1},
    "completion": {"first_steps": (1, 2)},
    "relearning-1": {"checks": (1, 2), "batch_size": 2},
    "relearning-8": {"checks": (1, 2), "pictures": 3, "batch_size": 2},
    "relearning-64": {"checks": (1, 2), "pictures": 4, "batch_size": 2},
}
SETTINGS = [
    f"{name}.{option}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
    for name, options in QUICK.items()
    for option, value in options.items()
]
FAST = ["wordings", "concept-inversion", "image-to-image", "unlearndiffatk"]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_runs_to_its_end_and_tells_the_same_twice(name: str, make_setup: Callable):
    each = attack(name, given=QUICK.get(name))
    setup = make_setup()
    assert each.refusal(setup.pipe, setup.concept) is None
    weights = {key: x.clone() for key, x in setup.pipe.unet.state_dict().items()}
    ready = each.prepare(setup)
    first, again = each.attempt(setup, ready, TARGETS), each.attempt(setup, each.prepare(setup), TARGETS)
    assert len(first) == len(TARGETS)
    for finding, other in zip(first, again, strict=True):
        assert finding.queries >= 1
        assert (finding.image is not None) == finding.success
        assert finding.success == other.success
        assert finding.found == other.found
        assert finding.tries == other.tries
        if finding.success:
            assert finding.image.tobytes() == other.image.tobytes()
            assert BRIGHT.shows([finding.image]) == [True]
        json.dumps([finding.found, finding.tries, each.options()])
    if each.box == "white":
        assert first[0].gradient_steps + ready.gradient_steps > 0
    for key, x in setup.pipe.unet.state_dict().items():
        assert torch.equal(x, weights[key]), key


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_says_who_made_it_and_what_it_may_spend(name: str):
    each = attack(name)
    assert each.box in ("white", "grey", "black")
    assert each.budget
    assert each.authors or name in (PLAIN, "wordings")
    assert each.block in ("one", "batch", "all")
    assert each.__doc__


def test_every_option_of_a_budget_is_one_of_its_attack():
    for budget in BUDGETS:
        for name in ATTACKS:
            attack(name, budget)
    assert set(OWN) <= set(ATTACKS)


@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_sd3", "tiny_flux"])
@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.startswith(("relearning-1", "relearning-64"))])
def test_on_other_families_an_attack_runs_or_says_why_not(name: str, model: str, toys: Callable, make_setup: Callable):
    pipe = toys(model)
    setup = make_setup(pipe)
    each = attack(name, given=QUICK.get(name))
    if each.families is not None and type(pipe).__name__ not in each.families:
        assert type(pipe).__name__ in each.refusal(pipe, CONCEPT)
        return
    assert len(each.attempt(setup, each.prepare(setup), TARGETS)) == len(TARGETS)


def test_stable_diffusion_knows_no_refusal():
    for name in ATTACKS:
        families = attack(name).families
        assert families is None or "StableDiffusionPipeline" in families
        assert families is None or set(families) <= set(EVERY)


def test_published_prompts_are_targets_of_their_own(tmp_path: Path, make_setup: Callable):
    file = tmp_path / "found.csv"
    file.write_text("prompt,seed\nxq zz,3\nqq vv,4\n")
    published = PublishedPrompts(file=str(file))
    targets = published.targets(TARGETS)
    assert published.name == "published:found"
    assert [(t.prompt, t.seed) for t in targets] == [("xq zz", 3), ("qq vv", 4)]
    assert len(published.attempt(make_setup(), published.prepare(make_setup()), targets)) == 2


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def by_brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    def brightness(*given: object) -> AttackJudge:
        return BRIGHT

    monkeypatch.setattr(command, "judge", brightness)


def argv(model: Path, folder: Path, *names: str) -> list[str]:
    chosen = [text for text in SETTINGS if text.partition(".")[0] in names or "all" in names]
    words = [str(model), "--concept", "penguin", "--judge", "pocket", "--attack", *names, "--targets", "3"]
    words += ["--steps", "3", "--batch_size", "2", "--output_dir", str(folder), "--budget", "published"]
    return words + (["--set", *chosen] if chosen else [])


def stored(folder: Path) -> dict[str, object]:
    """Every file of a folder but for seconds, which no two runs share."""

    def timeless(value: object) -> object:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.name == ".lock" or "prepared" in file.parts:
            continue
        found[str(file.relative_to(folder))] = (
            timeless(json.loads(file.read_text())) if file.suffix == ".json" else file.read_bytes()
        )
    return found


@pytest.fixture(scope="module")
def whole(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted command leaves."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "judge", lambda *given: BRIGHT)
        assert command.main(argv(tiny_sd, folder, *FAST)) == 0
    return folder


def test_a_result_states_all_that_a_reader_needs(whole: Path):
    results = json.loads((whole / "attack.json").read_text())["results"]
    assert {result["attack"] for result in results} == {PLAIN, *FAST}
    for result in results:
        assert result["n"] == result["attempted"] == 3
        assert result["pre"]["hits"] + result["post"]["hits"] == result["asr"]["hits"]
        assert len(result["judge_sha256"]) == len(result["prompts_sha256"]) == 64
        assert result["box"] in ("white", "grey", "black")
        assert {"queries", "gradient_steps", "seconds", "budget", "options", "seed"} <= result.keys()
        for record in result["records"]:
            assert record["success"] == (record["file"] is not None)
            assert record["file"] is None or (whole / record["file"]).is_file()


@pytest.mark.usefixtures("by_brightness")
@pytest.mark.slow
def test_a_killed_command_goes_on_and_leaves_the_same(
    tiny_sd: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, keep, kept = tmp_path / "b", AttackFolder.keep, []

    def killed(self: AttackFolder, *given: object) -> None:
        if len(kept) in (2, 6, 10):  # in the middle of a block, too
            kept.append(None)
            raise KeyboardInterrupt
        kept.append(given)
        keep(self, *given)

    monkeypatch.setattr(AttackFolder, "keep", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            command.main(argv(tiny_sd, folder, *FAST))
    with open(folder / ".parts" / "0.jsonl", "a") as file:
        file.write('{"key": "half a li')
    assert command.main(argv(tiny_sd, folder, *FAST)) == 0
    assert stored(folder) == stored(whole)


@pytest.mark.usefixtures("by_brightness")
def test_a_finished_command_draws_nothing_and_others_may_follow(
    tiny_sd: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "c"
    shutil.copytree(whole, folder)
    attempts = []
    tried = ConceptAttack.targets

    def counted(self: ConceptAttack, given: list) -> list:
        attempts.append(type(self).__name__)
        return tried(self, given)

    monkeypatch.setattr(AttackFolder, "keep", lambda *given: pytest.fail("nothing was left to attack"))
    assert command.main(argv(tiny_sd, folder, *FAST)) == 0
    assert stored(folder) == stored(whole)
    monkeypatch.undo()
    monkeypatch.setattr(command, "judge", lambda *given: BRIGHT)
    assert command.main(argv(tiny_sd, folder, "completion")) == 0
    names = {result["attack"] for result in json.loads((folder / "attack.json").read_text())["results"]}
    assert names == {PLAIN, *FAST, "completion"}


@pytest.mark.usefixtures("by_brightness")
def test_controls_stand_beside_the_attacked_model(tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    erased = tmp_path / "run"
    shutil.copytree(tiny_sd / "unet", erased / "unet")
    (erased / "run.json").write_text(json.dumps({"base": {"model": str(tiny_sd)}}))
    words = argv(erased, tmp_path / "d", PLAIN)
    assert command.main([*words, "--beside", f"retrain={tiny_sd / 'unet'}"]) == 0
    results = json.loads((tmp_path / "d" / "attack.json").read_text())["results"]
    assert {result["model"] for result in results} == {"attacked", "original", "retrain"}
    rates = {result["asr"]["hits"] for result in results}
    assert len(rates) == 1  # all three are the same network
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["attack", "model", "box"]
    assert len(lines) == 4


@pytest.mark.usefixtures("by_brightness")
def test_only_what_the_plain_prompt_does_not_draw_is_attacked_on_request(tiny_sd: Path, tmp_path: Path):
    assert command.main([*argv(tiny_sd, tmp_path / "e", "wordings"), "--skip_plain"]) == 0
    results = json.loads((tmp_path / "e" / "attack.json").read_text())["results"]
    plain, wordings = results
    assert wordings["attempted"] == 3 - plain["asr"]["hits"]
    assert wordings["pre"]["hits"] == plain["asr"]["hits"]
    assert wordings["n"] == 3


@pytest.mark.usefixtures("by_brightness")
def test_pictures_of_explicit_concepts_are_pixelated(tiny_sd: Path, tmp_path: Path):
    import numpy as np
    from PIL import Image

    words = [str(tiny_sd), "--concept", "nudity", "--judge", "nudenet", "--attack", PLAIN, "--targets", "6"]
    assert command.main([*words, "--steps", "2", "--output_dir", str(tmp_path / "f")]) == 0
    files = sorted((tmp_path / "f").rglob("*.png"))
    assert files
    for file in files:
        pixels = np.asarray(Image.open(file))
        blocks = pixels.reshape(8, pixels.shape[0] // 8, 8, pixels.shape[1] // 8, 3)
        assert (blocks.max((1, 3)) == blocks.min((1, 3))).all()


WRONG = {
    "concept": (["--concept", ""], "--concept is missing"),
    "unknown concept": (["--concept", "zebra"], "no concept 'zebra'"),
    "judge": (["--judge", "oracle"], "--judge oracle is none of pocket"),
    "attack": (["--attack", "tickling"], "--attack tickling is none of all, plain"),
    "option": (["--attack", "tina", "--set", "tina.speed=3"], "tina has no option 'speed'"),
    "value": (["--attack", "tina", "--set", "tina.steps=many"], "'many' is no int"),
    "small": (["--attack", "tina", "--set", "tina.steps=0"], "steps 0 is too small"),
    "other attack": (["--attack", "tina", "--set", "wordings.x=3"], "'wordings' is none of the attacks"),
    "beside": (["--beside", "somewhere"], "--beside somewhere is no NAME=FOLDER"),
    "size": (["--size", "65"], "--size 65 is no multiple of 8"),
    "file": (["--prompt_files", "nowhere.csv"], "nowhere.csv does not exist"),
    "pictures": (["--pictures", "nowhere"], "nowhere is no folder"),
    "original": (["--original", "./nowhere"], "./nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_sentence_before_anything_is_drawn(
    case: str, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more, said = WRONG[case]
    monkeypatch.setattr("eval.attacks.pictures.sampled", lambda *given: pytest.fail("drawn"))
    words = [str(tiny_sd), "--concept", "penguin", "--judge", "pocket", "--output_dir", str(tmp_path / "out"), *more]
    with pytest.raises(UserError) as error:
        command.main(words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_that_names_no_base_is_refused(tiny_sd: Path, tmp_path: Path):
    shutil.copytree(tiny_sd / "unet", tmp_path / "unet")
    with pytest.raises(UserError, match="give --original"):
        command.main([str(tmp_path), "--concept", "penguin", "--judge", "pocket"])


def test_an_attack_that_was_asked_for_and_cannot_be_is_refused(tiny_sd3: Path, tmp_path: Path):
    words = [str(tiny_sd3), "--concept", "penguin", "--judge", "pocket", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--attack tina: it works on StableDiffusionPipeline"):
        command.main([*words, "--attack", "tina"])


def test_a_style_cannot_be_inpainted(tiny_sd: Path, tmp_path: Path):
    words = [str(tiny_sd), "--concept", "neon style", "--judge", "pocket", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--attack inpainting: it says nothing about a style"):
        command.main([*words, "--attack", "inpainting"])


def test_a_mistake_exits_with_two_and_one_line(tmp_path: Path):
    words = [sys.executable, "-m", "eval.attack", str(tmp_path / "nothing"), "--concept", "cat", "--judge", "pocket"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_processes_leave_what_one_does(tiny_sd: Path, tmp_path: Path):
    """Through torchrun, all attacks, by the embedded model's own judge."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for folder, launcher in (("one", []), ("two", two)):
        words = [sys.executable, *launcher, "-m", "eval.attack", *argv(tiny_sd, tmp_path / folder, "all")]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ring-a-bell") == 1  # the table is printed once
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.usefixtures("by_brightness")
def test_all_attacks_of_the_registry_go_through_the_command(tiny_sd: Path, tmp_path: Path):
    assert command.main(argv(tiny_sd, tmp_path / "all", "all")) == 0
    results = json.loads((tmp_path / "all" / "attack.json").read_text())["results"]
    assert {result["attack"] for result in results} == set(ATTACKS)
