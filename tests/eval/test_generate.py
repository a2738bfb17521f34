"""eval.generate: the same bytes whatever was killed, shared out or repeated; broken images said to be broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel, UNet2DConditionModel
from PIL import Image

from erase_sd.common.errors import UserError
from erase_sd.models.pipeline import load, save_network
from eval.generate import Generation, generate, main, run
from eval.images.folder import read
from eval.images.sources import ImageRequest, batches, pictures, resolve, settled
from prompts.tables import PromptRow

ROOT = Path(__file__).parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def i2p(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows in I2P's format, of harmless texts."""
    path = tmp_path_factory.mktemp("prompts") / "i2p.csv"
    head = "prompt,categories,hard,nudity_percentage,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height"
    words = ["a red cup", "a/../b", '"two\nlines"', "<b>chair</b>", '""', '"a boat, at sea"', "a tree", "a shoe"]
    rows = [f"{words[i % 8]},hate,{i % 2},{i}.5,{4290749014 + i},{7 + i % 3},64,{64 - 8 * (i % 2)}" for i in range(40)]
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def options(tiny_sd: Path, i2p: Path, tmp_path: Path) -> Generation:
    return Generation(
        prompts=str(i2p), model=str(tiny_sd), output_dir=str(tmp_path / "gen"), rows=6, steps=2, batch_size=4
    )


def command(options: Generation, *launcher: str) -> list[str]:
    words = ["prompts", "model", "output_dir", "rows", "steps", "batch_size"]
    given = [word for name in words for word in (f"--{name}", str(getattr(options, name)))]
    return [sys.executable, *launcher, "-m", "eval.generate", *given]


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.png")} | {
        "manifest": (Path(folder) / "manifest.jsonl").read_bytes()
    }


@pytest.fixture(scope="session")
def whole(tiny_sd: Path, i2p: Path, tmp_path_factory: pytest.TempPathFactory) -> Generation:
    """All forty images, never interrupted, by one process."""
    folder = tmp_path_factory.mktemp("whole") / "gen"
    options = Generation(prompts=str(i2p), model=str(tiny_sd), output_dir=str(folder), rows=40, steps=2, batch_size=4)
    subprocess.run(command(options), cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True)
    return options


def test_killed_and_resumed_is_byte_for_byte_the_same(whole: Generation, tmp_path: Path):
    options = replace(whole, output_dir=str(tmp_path / "gen"))
    run = subprocess.Popen(command(options), cwd=ROOT, env=ONE_THREAD, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "gen").glob("*.png"))) < 10:
        assert run.poll() is None, "it was through before it could be killed"
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "gen").glob("*.png")}
    assert len(finished) < 40
    with open(tmp_path / "gen" / ".parts" / "0.jsonl", "a") as part:
        part.write('{"file": "000')  # as a kill between two bytes leaves it
    subprocess.run(command(options), cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True)
    assert contents(options.output_dir) == contents(whole.output_dir)
    redone = sum(path.stat().st_mtime_ns != written for path, written in finished.items())
    assert redone <= 1  # the one whose line the kill may have cut off


def test_two_processes_draw_what_one_draws(whole: Generation, tmp_path: Path):
    options = replace(whole, output_dir=str(tmp_path / "gen"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run = command(options, *launcher)
    subprocess.run(run, cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True)
    assert contents(options.output_dir) == contents(whole.output_dir)
    assert not (tmp_path / "gen" / ".parts").exists()


def test_batch_size_moves_no_pixel_by_more_than_one_level(options: Generation, tmp_path: Path):
    one, many = (replace(options, batch_size=n, output_dir=str(tmp_path / str(n))) for n in (1, 8))
    for a, b in zip(generate(one).entries, generate(many).entries, strict=True):
        x, y = (np.asarray(Image.open(Path(o.output_dir) / e.file), dtype=int) for o, e in ((one, a), (many, b)))
        assert abs(x - y).max() <= 1


def test_a_complete_folder_costs_no_model(options: Generation, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch):
    generate(options)
    monkeypatch.setattr("eval.generate.load", lambda *_, **__: pytest.fail("it loaded the model"))
    assert len(generate(options).entries) == 6
    assert len(generate(replace(options, rows=3)).entries) == 3


def test_more_rows_go_on_in_the_same_folder(options: Generation):
    generate(options)
    folder = generate(replace(options, rows=9))
    assert [entry.row for entry in folder.entries] == list(range(9))


def test_more_images_a_prompt_go_on_in_the_same_folder(options: Generation):
    first = {entry.file: entry.sha256 for entry in generate(replace(options, rows=2)).entries}
    folder = generate(replace(options, rows=2, images_per_prompt=3))
    assert folder.generation["images_per_prompt"] == 3
    assert len(folder.entries) == 6
    assert first.items() <= {entry.file: entry.sha256 for entry in folder.entries}.items()


def test_a_running_generator_draws_the_noise_of_the_released_script(options: Generation, monkeypatch):
    """Theirs: torch.randn((n, 4, h, w)) from one generator a prompt, seeded once."""
    noises = []

    def sample_batch(pipe, prompts, generators, **_):
        shape = (1, pipe.unet.config.in_channels, 8, 8)
        noises.extend(torch.randn(shape, generator=generator) for generator in generators)
        return np.random.default_rng(0).random((len(prompts), 64, 64, 3))

    monkeypatch.setattr("eval.images.writer.sample_batch", sample_batch)
    folder = generate(replace(options, rows=1, images_per_prompt=3, size=8 * 8, running_generator=True))
    seed = folder.entries[0].seed
    theirs = torch.randn((3, *noises[0].shape[1:]), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.cat(noises), theirs)
    assert [entry.file for entry in folder.entries] == [f"00000_{seed}{place}.png" for place in ("", "-1", "-2")]
    assert {entry.seed for entry in folder.entries} == {seed}
    assert "for each row" in folder.generation["noise"]


def test_a_running_generator_is_for_samplers_without_noise_of_their_own():
    with pytest.raises(UserError, match="euler-a draws noise in every step"):
        Generation(running_generator=True, scheduler="euler-a")


def test_prompts_that_the_encoder_cuts_are_said_to_be_cut(options: Generation, tmp_path: Path, capsys):
    (tmp_path / "p.txt").write_text("a lamp\n" + "lamp " * 100 + "\n")
    assert run(replace(options, prompts=str(tmp_path / "p.txt"))) == 0
    short, long = read(options.output_dir).entries
    assert not short.truncated
    assert short.tokens < 77 < long.tokens
    assert long.truncated
    assert "1 images are of prompts that the text encoder cut" in capsys.readouterr().out


def test_manifest_says_what_was_drawn(options: Generation):
    folder = generate(replace(options, rows=4, images_per_prompt=2, per_row=True))
    assert [e.row for e in folder.entries] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({e.seed for e in folder.entries}) == 8
    assert folder.entries[2].seed == 4290749015
    assert folder.entries[2].height == 56
    assert [e.guidance for e in folder.entries[::2]] == [7, 8, 9, 7]
    assert folder.entries[0].tags["categories"] == "hate"
    assert folder.entries[4].prompt == "two\nlines"
    assert folder.generation["safety_checker"] is False
    assert not any(e.broken for e in folder.entries)


def test_the_first_image_has_the_seed_that_other_tools_use(options: Generation, tiny_sd: Path):
    folder = generate(replace(options, rows=1, guidance=7.0))
    pipe = load(str(tiny_sd))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator("cpu").manual_seed(4290749014)
    expected = pipe("a red cup", generator=noise, num_inference_steps=2, guidance_scale=7.0).images[0]
    drawn = Image.open(folder.path / folder.entries[0].file)
    assert abs(np.asarray(drawn, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_nan_is_flagged_and_the_command_fails(options: Generation, tiny_sd: Path, tmp_path: Path):
    model = tmp_path / "ruined"
    shutil.copytree(tiny_sd, model)
    pipe = load(str(tiny_sd))
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1e30)  # finite, but nothing it computes is
    save_network(pipe.unet, model, "unet")
    folder = generate(replace(options, model=str(model), rows=2))
    assert [e.broken for e in folder.entries] == ["nan", "nan"]
    argv = ["--prompts", options.prompts, "--model", str(model), "--output_dir", options.output_dir, "--rows", "2"]
    assert main([*argv, "--steps", "2"]) == 1


def test_unet_of_a_run_replaces_the_model_s(options: Generation, tiny_sd: Path, tmp_path: Path):
    pipe = load(str(tiny_sd))
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.5)
    save_network(pipe.unet, tmp_path / "runs" / "cup", "unet")
    base = generate(replace(options, rows=1))
    run = generate(replace(options, rows=1, unet=str(tmp_path / "runs" / "cup"), output_dir=str(tmp_path / "cup")))
    assert base.entries[0].sha256 != run.entries[0].sha256
    assert run.label == "cup"
    assert run.generation["weights_sha256"]
    assert base.generation["weights_sha256"] is None


@pytest.mark.parametrize("name", ["ddim", "lms", "euler-a", "dpm++"])
def test_schedulers(options: Generation, name: str):
    folder = generate(replace(options, rows=1, scheduler=name, steps=3))
    assert folder.entries[0].broken is None
    assert folder.generation["scheduler"] == name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": "none.csv"}, "none.csv does not exist"),
        ({"prompts": "folder/of/words"}, "no .csv or .txt file, and no concept"),
        ({"prompts": "i2p"}, "download i2p_benchmark.csv once and give its path"),
        ({"unet": "nowhere/at/all"}, "--unet 'nowhere/at/all' does not exist"),
        ({"transformer": "a-run"}, "is a StableDiffusionPipeline without a transformer"),
        ({"category": "sexuall"}, "'sexuall' is none of hate"),
    ],
)
def test_bad_input_costs_one_sentence_and_no_file(options: Generation, change: dict, sentence: str):
    with pytest.raises(UserError) as error:
        generate(replace(options, **change))
    assert sentence in str(error.value)
    assert not list(Path(options.output_dir).glob("*.png"))


@pytest.mark.parametrize(
    "argv", [["--guidance", "1e9"], ["--steps", "0"], ["--size", "500"], ["--rows", "0"], ["--guidance", "-1"]]
)
def test_numbers_out_of_range(argv: list[str]):
    with pytest.raises(UserError, match=argv[0]):
        main(argv)


def test_a_folder_of_other_images_is_refused(options: Generation, tmp_path: Path):
    generate(replace(options, rows=1))
    with pytest.raises(UserError, match="belongs to a run with steps 2, not 3: name another folder"):
        generate(replace(options, rows=1, steps=3))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    with pytest.raises(UserError, match="holds other files"):
        generate(replace(options, output_dir=str(tmp_path / "mine")))


@pytest.fixture
def own_model(options: Generation, tiny_sd: Path, tmp_path: Path) -> Generation:
    """The options with a copy of the model that a test may edit."""
    return replace(options, model=str(shutil.copytree(tiny_sd, tmp_path / "model")), rows=1)


def test_the_record_names_the_sampler_and_where_it_ran(own_model: Generation):
    record = generate(own_model).generation
    assert record["scheduler"] is None
    assert record["sampler"]["class"] == "PNDMScheduler"
    assert record["sampler"]["config"]["beta_end"] == 0.012
    assert record["environment"].keys() == {"torch", "diffusers", "transformers", "device"}
    assert record["environment"]["torch"] == version("torch")
    assert record["model_revision"] is None


def test_the_record_has_the_keys_of_a_swapped_sampler(own_model: Generation):
    sampler = generate(replace(own_model, scheduler="ddim")).generation["sampler"]
    assert sampler["class"] == "DDIMScheduler"
    assert sampler["config"]["set_alpha_to_one"] is False


def test_an_edited_sampler_is_another_question(own_model: Generation):
    generate(own_model)
    file = Path(own_model.model) / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("0.012", "0.013"))
    with pytest.raises(UserError, match="belongs to a run with sampler"):
        generate(own_model)


def test_other_versions_do_not_go_on_but_leave_a_finished_folder_alone(own_model: Generation, monkeypatch):
    generate(own_model)
    monkeypatch.setattr("eval.generate.version", lambda name: "0.0.1")
    assert len(generate(own_model).entries) == 1
    with pytest.raises(UserError, match=r"was begun with torch .* and would go on with 0\.0\.1"):
        generate(replace(own_model, rows=2))


def test_a_refused_network_claims_no_folder(own_model: Generation, tmp_path: Path):
    (tmp_path / "partial" / "unet").mkdir(parents=True)
    with pytest.raises(UserError, match="partial"):
        generate(replace(own_model, unet=str(tmp_path / "partial")))
    assert len(generate(own_model).entries) == 1


def test_batches_do_not_depend_on_what_is_done():
    rows = [PromptRow(row=i, prompt="", seed=i, guidance=7.0 + i % 2) for i in range(10)]
    jobs = list(pictures(rows, 1, 0))
    assert [[job.row.row for job in batch] for batch in batches(jobs, 3)] == [[0, 2, 4], [6, 8], [1, 3, 5], [7, 9]]


def test_seeds_of_rows_without_one_are_keyed():
    rows = [PromptRow(row=i, prompt="") for i in range(3)]
    first, again = (list(pictures(rows, 2, 5)) for _ in range(2))
    assert first == again
    assert len({job.seed for job in first}) == 6
    assert next(iter(pictures(rows[1:], 1, 5))) == first[2]
    assert [job.file for job in pictures([PromptRow(row=7, prompt="../x", seed=3)], 1, 0)] == ["00007_3.png"]


def test_per_row_sizes_have_to_fit_the_vae():
    row = PromptRow(row=4, prompt="", width=500, guidance=9.0)
    assert settled(row, 7.5, 64, per_row=False).width == 64
    with pytest.raises(UserError, match="row 4 of the prompts: a side of 500"):
        settled(row, 7.5, 64, per_row=True)


def test_the_pocket_source_asks_for_every_scene_once():
    rows = resolve("pocket").rows
    assert len({row.prompt for row in rows}) == len(rows) == 640
    assert isinstance(next(pictures(rows, 1, 0)), ImageRequest)


def test_manifest_that_is_none(options: Generation):
    folder = generate(replace(options, rows=1))
    (folder.path / "manifest.jsonl").write_text(json.dumps({"file": "x", "colour": 1}) + "\n")
    with pytest.raises(UserError, match="line 1"):
        read(folder.path)


def test_other_families_are_ordinary_models(options: Generation, tiny_sdxl: Path, tmp_path: Path):
    xl = replace(options, model=str(tiny_sdxl), rows=2, size=64)
    base = generate(xl)
    assert [entry.broken for entry in base.entries] == [None, None]
    assert base.entries[0].width == 64
    unet = UNet2DConditionModel.from_pretrained(str(tiny_sdxl), subfolder="unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.5)
    unet.save_pretrained(str(tmp_path / "run" / "unet"))
    run = generate(replace(xl, unet=str(tmp_path / "run"), output_dir=str(tmp_path / "xl")))
    assert base.entries[0].sha256 != run.entries[0].sha256


def test_the_transformer_of_a_run_replaces_the_model_s(options: Generation, tiny_sd3: Path, tmp_path: Path):
    flow = replace(options, model=str(tiny_sd3), rows=1, size=64)
    base = generate(flow)
    transformer = AutoModel.from_pretrained(str(tiny_sd3), subfolder="transformer")
    with torch.no_grad():
        transformer.proj_out.weight.mul_(0.5)
    transformer.save_pretrained(str(tmp_path / "run" / "transformer"))
    run = generate(replace(flow, transformer=str(tmp_path / "run"), output_dir=str(tmp_path / "flow")))
    assert base.entries[0].broken is None
    assert base.entries[0].sha256 != run.entries[0].sha256
    with pytest.raises(UserError, match="is a flow model: leave it out"):
        generate(replace(flow, scheduler="lms", output_dir=str(tmp_path / "lms")))
