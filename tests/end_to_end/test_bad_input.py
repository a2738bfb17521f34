"""What a user can get wrong on the command line of erase-sd: one sentence, code 2, nothing drawn, nothing left behind.

The table runs in this process through the function that the installed command calls; one line of it runs through both
real entry points.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from erase_sd import train
from erase_sd.denoising import concept, samples
from tests.end_to_end.test_train_cli import QUICK, environment

ROOT = Path(__file__).parents[2]
UNET, ENCODER = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 12345\n"
CAT = "--concept cat"
POCKET = f"{CAT} --model pocket"

# What is typed, and a part of the sentence. These need no model.
TYPED = [
    ("", "concept is empty"),
    ("--concept", "--concept"),
    ("--concept ''", "concept is empty"),
    ("--concept cat ' '", "concept is empty"),
    ("--concept cat cat", "names 'cat' twice"),
    ("cat", "'cat' does not belong to any option"),
    (f"{CAT} --fractoin 0.5", "did you mean --fraction?"),
    (f"{CAT} --frac 0.5", "there is no option --frac"),
    (f"{CAT} -x", "there is no option -x"),
    (f"{CAT} --xyz=1", "there is no option --xyz"),
    (f"{CAT} --method scissor", "unknown method 'scissor'"),
    (f"{CAT} --method ''", "unknown method ''"),
    (f"{CAT} --method uce --fraction 0.1", "there is no option --fraction"),
    (f"{CAT} --method uce --lr 1", "there is no option --lr"),
    (f"{CAT} --preset pepar", "unknown preset 'pepar'"),
    (f"{CAT} --method esd --preset authors-nsfw", "unknown preset 'authors-nsfw'"),
    (f"{CAT} --kind colour", "'colour' is not one of auto"),
    (f"{CAT} --seed", "expected one argument"),
    (f"{CAT} --seed -1", "--seed"),
    (f"{CAT} --seed 1.5", "'1.5' is not a whole number"),
    (f"{CAT} --seed one", "'one' is not a whole number"),
    (f"{CAT} --seed 0 1", "'1' does not belong to any option"),
    (f"{CAT} --lr fast", "'fast' is not a number"),
    (f"{CAT} --lr 1e-4x", "'1e-4x' is not a number"),
    (f"{CAT} --lr 1,5", "'1,5' is not a number"),
    (f"{CAT} --lr none", "'none' is not a number"),
    (f"{CAT} --lr nan", "'nan' is not a number"),
    (f"{CAT} --lr inf", "'inf' is no finite number"),
    (f"{CAT} --lr=-1e-5", "lr -1e-05 is negative"),
    (f"{CAT} --learning_rate=-1e-5", "lr -1e-05 is negative"),
    (f"{CAT} --lam inf", "no finite number"),
    (f"{CAT} --lam=-1", "lam -1"),
    (f"{CAT} --ridge inf", "no finite number"),
    (f"{CAT} --margin nan", "not a number"),
    (f"{CAT} --max_grad_norm inf", "no finite number"),
    (f"{CAT} --max_grad_norm 0", "--max_grad_norm 0 would clip every step away"),
    (f"{CAT} --max_grad_norm=-1", "max_grad_norm -1"),
    (f"{CAT} --momentum 5", "--momentum 5.0 is not below 1"),
    (f"{CAT} --momentum 1", "--momentum 1.0 is not below 1"),
    (f"{CAT} --weight_decay=-0.1", "weight_decay -0.1"),
    (f"{CAT} --milestones 5", "--milestones 5.0 is outside [0, 1]"),
    (f"{CAT} --milestones 0.5 -1", "--milestones -1.0 is outside [0, 1]"),
    (f"{CAT} --milestones half", "'half' is not a number"),
    (f"{CAT} --milestones", "expected at least one argument"),
    (f"{CAT} --warmup_steps 200 --steps 100", "--warmup_steps 200 is more than the 100 steps"),
    (f"{CAT} --lr_warmup_steps 200 --max_train_steps 100", "--warmup_steps 200 is more than the 100 steps"),
    (f"{CAT} --steps=-1", "steps -1"),
    (f"{CAT} --steps 2.5", "'2.5' is not a whole number"),
    (f"{CAT} --steps 1e3", "'1e3' is not a whole number"),
    (f"{CAT} --optimizer adam", "'adam' is not one of sgd, adamw"),
    (f"{CAT} --schedule step", "'step' is not one of constant"),
    (f"{CAT} --rounding up", "'up' is not one of nearest"),
    (f"{CAT} --rounding kahan", "--rounding kahan is of bf16 weights"),
    (f"{CAT} --weights_dtype float16", "'float16' is not one of float32, bfloat16"),
    (f"{CAT} --mixed_precision fp8", "'fp8' is not one of no"),
    (f"{CAT} --fraction 1.5", "--fraction 1.5 is outside [0, 1]"),
    (f"{CAT} --fraction=-0.1", "fraction -0.1"),
    (f"{CAT} --saliency taylor", "'taylor' is not one of abs"),
    (f"{CAT} --init gaussian", "'gaussian' is not one of uniform"),
    (f"{CAT} --sensitivity_batches 0", "--sensitivity_batches 0 ranks nothing"),
    (f"{CAT} --sensitivity_batches=-3", "sensitivity_batches -3"),
    (f"{CAT} --anchor_model old", "'old' is not one of original, current"),
    (f"{CAT} --anchor_model current", "give --anchor_model original"),
    (f"{CAT} --method concept-ablation --preset sd --no-anchor_pictures --anchor a b", "2 anchors for 1 concepts"),
    (f"{CAT} --batch_size 0", "--batch_size 0 is too small"),
    (f"{CAT} --train_batch_size 0", "--batch_size 0 is too small"),
    (f"{CAT} --gradient_accumulation_steps 0", "--gradient_accumulation_steps 0 is too small"),
    (f"{CAT} --redirect_draws 0", "--redirect_draws 0 is too small"),
    (f"{CAT} --drop_captions 1.01", "--drop_captions 1.01 is outside [0, 1]"),
    (f"{CAT} --drop_captions=-1", "--drop_captions -1.0 is outside [0, 1]"),
    (f"{CAT} --forget_images 0", "--forget_images 0 is too small"),
    (f"{CAT} --retain_images 0", "--retain_images 0 is too small"),
    (f"{CAT} --sample_steps 0", "--sample_steps 0 is too small"),
    (f"{CAT} --sample_guidance=-1", "--sample_guidance -1.0 is too small"),
    (f"{CAT} --sample_batch_size 0", "--sample_batch_size 0 is too small"),
    (f"{CAT} --resolution 100", "--resolution 100 is no multiple of 16"),
    (f"{CAT} --resolution 0", "--resolution 0"),
    (f"{CAT} --picture_steps 0", "--picture_steps 0 is too small"),
    (f"{CAT} --eval_forget=-1", "--eval_forget -1 is too small"),
    (f"{CAT} --checkpointing_steps 0", "--checkpointing_steps 0 is too small"),
    (f"{CAT} --checkpoints_total_limit 0", "--checkpoints_total_limit 0 is too small"),
    (f"{CAT} --report_to paper", "'paper' is not one of tensorboard"),
    (f"{CAT} --method salun --mask_fraction 1.5", "--mask_fraction 1.5 is outside [0, 1]"),
    (f"{CAT} --method uce --lam 0", "--lam 0 leaves the equations without a unique solution"),
    (f"{CAT} --method uce --erase_scale=-1", "erase_scale -1"),
    (f"{CAT} --method sld --momentum 1", "--momentum 1.0 never forgets the past"),
    (f"{CAT} --method esd --start here", "'here' is not one of concept"),
    (f"{CAT} --method esd --anchor_model current", "esd learns from the original network"),
    (f"{CAT} --method selective-amnesia --fisher_batches 0", "--fisher_batches 0 measures no Fisher information"),
    (f"{CAT} --model ./missing", "'./missing' does not exist"),
    (f"{CAT} --model /no/such/folder", "does not exist"),
    (f"{CAT} --model a/b/c", "does not exist"),
    (f"{CAT} --model ''", "does not exist"),
    (f"{CAT} --model ./missing.safetensors", "does not exist"),
    (f"{CAT} --model ./missing --model_config /nope", "--model_config is of a model in a single file"),
    (f"{CAT} --model pocket --model_config /nope", "--model_config is of a model in a single file"),
    (f"{CAT} --model owner/nothing", "cannot be had from the Hugging Face Hub"),
    (CAT, "cannot be had from the Hugging Face Hub"),
    ("--concept dragon --model pocket", "the pocket model has no concept 'dragon'"),
    ("--concept cat frog cat --model pocket", "names 'cat' twice"),
    (f"{POCKET} --kind style", "cat"),
    (f"{POCKET} --anchor dragon", "dragon"),
    (f"{POCKET} --anchor cat", "'cat' is to be erased"),
    (f"{POCKET} --anchor dog frog", "2 anchors for 1 concepts"),
    (f"{POCKET} --resolution 64", "--resolution 64 is for other models"),
]
# The same on a small model that loads: these are refused by its network, its words or its place.
ON_A_MODEL = [
    ("--train_scope everything", "unknown parameter group 'everything'"),
    ("--rank_scope 're:('", "is not a regular expression"),
    ("--trim_scope re:nothing", "matches nothing"),
    ("--trim_scope re:norm1", "--trim_scope re:norm1 holds norms only"),
    ("--trim_scope full --train_scope xattn", "--trim_scope full re-initialises"),
    ("--trim_scope attn --rank_scope kv", "which --rank_scope kv never ranks"),
    ("--batch_size 2 --gradient_accumulation_steps 3", "--batch_size 2 leaves micro-batches empty"),
    ("--method uce --train_scope selfattn", "uce edits attn2.to_k and attn2.to_v"),
    ("--method uce --concept 'red car' --anchor 'a red sports car on a road'", "says no more than its anchor"),
    ("--method forget-me-not --concept 'red car' --anchor 'a red sports car on a road'", "says no more than"),
    (f"--concept {'x' * 300}", "300 characters"),
    ("--anchor 'a cat on a sofa'", "names 'cat', which is to be erased"),
]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[[list[str], str], None]:
    """Return a check that these words end in one sentence with this part, before anything is drawn or written."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for module in (concept, samples):
        monkeypatch.setattr(module, "sample", lambda *args, **options: pytest.fail("an image was sampled"))

    def check(words: list[str], part: str) -> None:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["erase-sd", *words])
        with pytest.raises(SystemExit) as stop:
            train.program()
        err = capsys.readouterr().err
        assert stop.value.code == 2, err[-2000:]
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err[-2000:]
        assert part in err
        assert not list(here.iterdir())

    return check


def words_of(line: str) -> list[str]:
    """Split a line as a shell does, single quotes alone."""
    parts = line.split("'")
    words: list[str] = []
    for i, part in enumerate(parts):
        words += [part] if i % 2 else part.split()
    return words


def test_the_table_has_a_hundred_lines() -> None:
    lines = {line for line, _ in TYPED}
    assert len(lines) == len(TYPED)
    assert len(TYPED) >= 100


@pytest.mark.parametrize(("line", "part"), TYPED, ids=lambda x: x or "nothing")
def test_what_is_typed_wrong_is_one_sentence(refused: Callable, line: str, part: str) -> None:
    refused(words_of(line), part)


@pytest.mark.parametrize("more", [(), ("--dry_run",)], ids=["run", "dry run"])
@pytest.mark.parametrize(("line", "part"), ON_A_MODEL, ids=lambda x: x[:60])
def test_what_a_model_cannot_do_is_refused_by_the_run_and_by_the_dry_run(
    refused: Callable, tiny_sd: Path, line: str, part: str, more: tuple[str, ...]
) -> None:
    given = words_of(line)
    what = [] if "--concept" in given else ["--concept", "cat"]
    refused([*what, "--model", str(tiny_sd), *given, *more], part)


@pytest.mark.parametrize("method", [pytest.param("esd", marks=pytest.mark.slow), "finetune"])
def test_a_method_that_reads_no_anchor_takes_any(tiny_sd: Path, method: str, capsys: pytest.CaptureFixture) -> None:
    words = ["--concept", "red car", "--anchor", "a red sports car on a road", "--method", method, "--dry_run"]
    assert train.main([*words, "--model", str(tiny_sd)]) == 0
    assert "steps of" in capsys.readouterr().out


def test_uce_forget_me_not_and_sld_know_the_families_they_cannot_edit(
    refused: Callable, tiny_sd3: Path, tiny_flux: Path
) -> None:
    for method, model, part in (
        ("uce", tiny_sd3, "uce edits"),
        ("uce", tiny_flux, "uce edits"),
        ("forget-me-not", tiny_sd3, "forget-me-not needs cross-attention layers"),
        ("sld", tiny_flux, "sld needs classifier-free guidance"),
    ):
        refused(["--concept", "cat", "--method", method, "--model", str(model), "--dry_run"], part)


# Models that cannot work: what is done to a copy of one, and a part of the sentence.


def edited(file: str, **change: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        values = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(values | change))

    return edit


def removed(name: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()

    return remove


def replaced(file: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / file).write_text(text)


def cut_short(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes()[:5000])


def nine_channels(model: Path) -> None:
    config = UNet2DConditionModel.load_config(str(model / "unet"))
    UNet2DConditionModel.from_config(config | {"in_channels": 9}).save_pretrained(str(model / "unet"))


def half_written(file: str) -> Callable[[Path], None]:
    """A whole fp16 variant beside a usual file that lacks half of the tensors."""

    def write(model: Path) -> None:
        weights = load_file(model / file)
        save_file(weights, str(model / file).replace(".safetensors", ".fp16.safetensors"), {"format": "pt"})
        half = dict(sorted(weights.items())[: len(weights) // 2])
        save_file(half, model / file, {"format": "pt"})

    return write


def two_variants(model: Path) -> None:
    for name in ("fp16", "bf16"):
        shutil.copy(model / UNET, str(model / UNET).replace(".safetensors", f".{name}.safetensors"))
    (model / UNET).unlink()


def mixed_variants(model: Path) -> None:
    for file, name in ((UNET, "fp16"), (ENCODER, "bf16")):
        (model / file).rename(str(model / file).replace(".safetensors", f".{name}.safetensors"))


def shard_missing(model: Path) -> None:
    shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    (model / UNET).rename(model / "unet" / shard)
    index = {"weight_map": {"a": shard, "b": shard.replace("00001-", "00002-")}}
    (model / f"{UNET}.index.json").write_text(json.dumps(index))


def index_missing(model: Path) -> None:
    (model / UNET).rename(model / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")


BROKEN = {
    "no index": (removed("model_index.json"), "not a complete diffusers model"),
    "an index that is no JSON": (replaced("model_index.json", "{"), "not a complete diffusers model"),
    "an index of another pipeline": (edited("model_index.json", _class_name="AudioPipeline"), "is a AudioPipeline"),
    "no unet": (removed("unet"), "has no unet/"),
    "no weights": (removed(UNET), "has no weight file"),
    "no config": (removed("unet/config.json"), "unet has no config.json"),
    "cut short": (cut_short, "is damaged or incomplete"),
    "a pointer for weights": (replaced(UNET, POINTER), "is a git-lfs pointer"),
    "a pointer for a config": (replaced("unet/config.json", POINTER), "is a git-lfs pointer"),
    "half a unet beside a variant": (half_written(UNET), "its weight file is partial"),
    "half an encoder beside a variant": (half_written(ENCODER), "its weight file is partial"),
    "two variants": (two_variants, "has the variants bf16, fp16"),
    "variants mixed": (mixed_variants, "mixes the variants bf16, fp16"),
    "a shard missing": (shard_missing, "names diffusion_pytorch_model-00002-of-00002.safetensors, which is missing"),
    "an index of shards missing": (index_missing, "no index of the parts"),
}
UNFIT = {  # by their configurations alone: the dry run says so too
    "an inpainting unet": (nine_channels, "takes 9 channels and the VAE makes 4"),
    "another scheduler": (
        edited("scheduler/scheduler_config.json", prediction_type="score"),
        "with prediction_type score",
    ),
}


@pytest.fixture
def model(tiny_sd: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may break."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


@pytest.mark.parametrize("case", BROKEN)
def test_a_model_folder_that_cannot_work_is_one_sentence(refused: Callable, model: Path, case: str) -> None:
    damage, part = BROKEN[case]
    damage(model)
    refused(["--concept", "cat", "--model", str(model)], part)


@pytest.mark.parametrize("more", [(), ("--dry_run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("case", UNFIT)
def test_a_model_that_cannot_be_erased_from_is_one_sentence(
    refused: Callable, model: Path, case: str, more: tuple[str, ...]
) -> None:
    damage, part = UNFIT[case]
    damage(model)
    refused(["--concept", "cat", "--model", str(model), *more], part)


KEYS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FILES = {
    "a LoRA": (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"], "is a LoRA, no model"),
    "a LoRA of peft": ([f"unet.{KEYS}.lora_A.weight"], "is a LoRA, no model"),
    "attention alone": ([f"{KEYS}.weight"], "is a file of cross-attention weights alone"),
    "a textual inversion": (["emb_params"], "is a textual inversion, no model"),
    "nothing in it": ([], "is empty, no model"),
    "a checkpoint without its layout": (["model.diffusion_model.x"], "give --model_config"),
}


@pytest.mark.parametrize("more", [(), ("--dry_run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("case", FILES)
def test_a_file_that_holds_no_model_is_one_sentence(
    refused: Callable, tiny_sd: Path, tmp_path: Path, case: str, more: tuple[str, ...]
) -> None:
    names, part = FILES[case]
    weight = load_file(tiny_sd / UNET)["conv_in.bias"]
    save_file({name: weight.clone() for name in names}, tmp_path / "file.safetensors", {"format": "pt"})
    layout = ["--model_config", str(tiny_sd)] if "layout" not in case else []
    refused(["--concept", "cat", "--model", str(tmp_path / "file.safetensors"), *layout, *more], part)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("x.safetensors", POINTER, "is a git-lfs pointer"),
        ("x.safetensors", "no weights", "is damaged or incomplete"),
        ("x.ckpt", "pickled", "is no .safetensors file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    refused: Callable, tiny_sd: Path, tmp_path: Path, name: str, text: str, part: str
) -> None:
    (tmp_path / name).write_text(text)
    refused(["--concept", "cat", "--model", str(tmp_path / name), "--model_config", str(tiny_sd)], part)


# Places that cannot take a run: what is there, the folder's name below it, and a part of the sentence.


def with_file(name: str, text: str | bytes) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return write


PLACES = {
    "a file in the way": (with_file("run", "mine"), "run", "is a file"),
    "below a file": (with_file("run", "mine"), "run/below", "cannot be used"),
    "a dangling link": (lambda place: (place / "run").symlink_to(place / "nowhere" / "else"), "run", "cannot be used"),
    "a name too long": (lambda place: None, "x" * 300, "cannot be used"),
    "other files": (with_file("run/thesis.txt", "years"), "run", "holds other files"),
    "a configuration of something else": (with_file("run/job.json", "{"), "run", "holds a job.json of something else"),
    "a configuration in Latin-1": (with_file("run/job.json", b'{"a": "\xe9"}'), "run", "of something else"),
    "another run": (with_file("run/job.json", '{"lr": 1}'), "run", "belongs to a run with"),
    "a damaged status": (with_file("run/status.json", "[1"), "run", "status.json is damaged"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_takes_no_run_is_one_sentence_and_is_left_alone(
    refused: Callable, tiny_sd: Path, tmp_path: Path, case: str
) -> None:
    make, name, part = PLACES[case]
    make(tmp_path)
    before = sorted(map(str, tmp_path.rglob("*")))
    refused(["--concept", "cat", "--model", str(tiny_sd), *QUICK, "--output_dir", str(tmp_path / name)], part)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


CONSOLE = ("-c", "from erase_sd.train import program; program()")
SCRIPT = (str(ROOT / "erase_sd" / "train.py"),)


@pytest.mark.parametrize("entry", [CONSOLE, SCRIPT], ids=["erase-sd", "train.py"])
@pytest.mark.parametrize("line", ["--concept dragon --model pocket", "--concept cat --lr inf"])
def test_both_real_entry_points_answer_with_one_sentence(tmp_path: Path, entry: tuple[str, ...], line: str) -> None:
    env = environment(PYTHONPATH=str(ROOT))
    command = [sys.executable, *entry, *words_of(line)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir())
