"""Records hold what a reader needs to repeat a run, pictures are pictures, and cards do not execute anything."""

import copy
import csv
import json
import math
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from erase_sd.common.cli import parse
from erase_sd.denoising.card import CardFacts, inert, measuring_commands, portable, swap_in_snippet, write_card
from erase_sd.denoising.license import license_of
from erase_sd.pocket import FOLDER
from erase_sd.run.plots import write_saliency, write_trace
from erase_sd.run.record import environment, run_record, summary, weights_hash, write_run, write_status
from eval.generate import Generation

TRACE = [
    {
        "step": step,
        "loss_r": 0.2 + 0.1 * math.exp(-step / 20) + 0.01 * math.sin(3 * step),
        "loss_f": 0.15 + 0.006 * step + 0.02 * math.cos(5 * step),
        "loss_o": 0.3 * math.exp(-step / 30) + 0.02 * math.sin(7 * step) ** 2,
        "cos": 0.6 * math.exp(-step / 25) - 0.1 + 0.05 * math.sin(2 * step),
        "c": max(0.0, 0.5 * math.exp(-step / 25) - 0.05 + 0.1 * math.sin(2 * step)),
        "bit": 0.5 * math.exp(-step / 25) - 0.05 + 0.1 * math.sin(2 * step) > 0,
        "ceiling": False,
        "lr": 1e-4,
    }
    for step in range(1, 101)
]
SCORES = {
    "concept": {"before": 1.0, "after": 0.0125, "other_share": 0.03},
    "retain": {"object": {"before": 0.97, "after": 0.96}, "style": {"before": 0.88, "after": 0.87}},
    "n": {"forget": 200, "retain": 1000},
    "ci95": {"concept": {"before": [0.98, 1.0], "after": [0.0, 0.03]}},
    "protocol": "20 steps",
}


def a_card(folder: Path, **changes: object) -> str:
    card = {
        "model": "CompVis/stable-diffusion-v1-4",
        "concepts": ["cat"],
        "method": "scissorhands",
        "preset": "default",
        "knobs": {"fraction": 0.0005, "lam": 0.5},
        "command": "accelerate launch erase_sd/train.py --concept cat",
        "snippet": "pipe.unet = UNet2DConditionModel.from_pretrained(...)",
        "license": {"license": "creativeml-openrail-m"},
        "measuring": "python -m eval.generate --model 'a<b'",
    }
    write_card(folder, CardFacts(**card | changes))
    return (folder / "README.md").read_text()


def test_run_record(tmp_path: Path) -> None:
    run = run_record({"lam": 0.5}, seed=7, base="pocket", base_hash="abc", seconds=1.234, trace=TRACE, n=3)
    write_run(tmp_path, run)
    assert json.loads((tmp_path / "run.json").read_text()) == run
    assert run["config"] == {"lam": 0.5}
    assert run["seed"] == 7
    assert run["base"] == {"model": "pocket", "hash": "abc"}
    assert run["seconds"] == 1.23
    assert run["peak_memory_mib"]["host"] > 10
    assert run["n"] == 3
    assert run["environment"]["torch"]
    assert run["environment"] == environment()


def test_summary() -> None:
    rows = [{"step": 1, "loss_r": 3.0, "loss_o": None, "bit": True}, {"step": 2, "loss_r": 1.0, "bit": False}]
    low_to_high = {"first": 3.0, "last": 1.0, "min": 1.0, "max": 3.0}
    assert summary(rows) == {"steps": 2, "loss_r": low_to_high, "bit": 0.5}
    assert summary([]) == {"steps": 0}


def test_weights_hash_sees_every_weight_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    before = weights_hash(model)
    assert before == weights_hash(copy.deepcopy(model).requires_grad_(False))
    with torch.no_grad():
        model[0].bias[1] += 1
    assert before != weights_hash(model)


def test_a_finished_run_is_not_lost_to_a_number_that_json_has_not(tmp_path: Path) -> None:
    write_run(tmp_path, run_record({"lam": math.nan, "at": [math.inf]}, seed=0, base="", base_hash="", seconds=0))
    assert json.loads((tmp_path / "run.json").read_text())["config"] == {"lam": "nan", "at": ["inf"]}


def test_status(tmp_path: Path) -> None:
    write_status(tmp_path, "failed", 2, "no such preset")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"state": "failed", "code": 2, "message": "no such preset"}


def test_trace(tmp_path: Path) -> None:
    write_trace(tmp_path, TRACE)
    rows = list(csv.DictReader((tmp_path / "trace.csv").open()))
    assert len(rows) == 100
    assert float(rows[3]["cos"]) == TRACE[3]["cos"]
    assert is_picture(tmp_path / "trace.png")


def test_trace_of_steps_without_objective(tmp_path: Path) -> None:
    write_trace(tmp_path, [row | {"loss_o": None} for row in TRACE[:2]])
    assert is_picture(tmp_path / "trace.png")


def test_one_step_is_a_row_and_no_plot_of_one_dot(tmp_path: Path) -> None:
    write_trace(tmp_path, [TRACE[0]])
    assert len((tmp_path / "trace.csv").read_text().splitlines()) == 2
    assert not (tmp_path / "trace.png").exists()


def test_trace_of_any_record(tmp_path: Path) -> None:
    write_trace(tmp_path, [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25, "penalty": 3.0, "full": True}])
    assert (tmp_path / "trace.csv").read_text() == "step,loss,penalty,full\n0,0.5,,\n1,0.25,3.0,True\n"
    assert is_picture(tmp_path / "trace.png")


def test_no_steps_no_trace(tmp_path: Path) -> None:
    write_trace(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_saliency(tmp_path: Path, sd14_unet) -> None:
    sizes = {name: p.numel() for name, p in sd14_unet.named_parameters()}
    changed = {name: size // (100 + index) for index, (name, size) in enumerate(sizes.items()) if ".attn" in name}
    write_saliency(tmp_path, changed, sizes)
    rows = list(csv.DictReader((tmp_path / "saliency.csv").open()))
    assert [row["parameter"] for row in rows] == list(sizes)
    assert sum(int(row["changed"]) for row in rows) == sum(changed.values())
    assert is_picture(tmp_path / "saliency.png")


def test_saliency_when_nothing_changed(tmp_path: Path) -> None:
    write_saliency(tmp_path, {}, {"layer1.0.weight": 10, "fc.bias": 2})
    assert is_picture(tmp_path / "saliency.png")


def is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.format == "PNG" and len(set(picture.convert("L").get_flattened_data())) > 10


def test_card_front_matter(tmp_path: Path) -> None:
    text = a_card(tmp_path, scores=SCORES)
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert header["base_model_relation"] == "finetune"
    assert header["library_name"] == "diffusers"
    assert header["license"] == "creativeml-openrail-m"
    assert ModelCard.load(str(tmp_path / "README.md")).data.pipeline_tag == "text-to-image"


def test_card_tells_what_matters(tmp_path: Path) -> None:
    text = a_card(tmp_path, scores=SCORES)
    for part in ("## Limits", "incomplete", "Bias", "Misuse", "Not validated on SD v1.4", "| fraction | 0.0005 |"):
        assert part in text
    assert "| concept | 100.0 (98.0 to 100.0) | 1.2 (0.0 to 3.0) | 200 |" in text
    assert "| retain object | 97.0 | 96.0 | 1000 |" in text
    assert "Protocol: 20 steps." in text
    assert "(creativeml-openrail-m) and its use restrictions" in text
    assert "no longer draws" not in text
    assert "in 100.0 % before and in 1.2 % after, of 200 pictures" in text
    assert "right in 92.5 % before and in 91.5 % after" in text


def test_a_card_tells_of_each_concept(tmp_path: Path) -> None:
    each = {"cat": {"before": 1.0, "after": 0.0, "n": 150}, "neon style": {"before": 0.98, "after": 0.96, "n": 50}}
    text = a_card(tmp_path, scores=SCORES | {"concepts": each}, concepts=["cat", "neon style"])
    assert "Asked for cat, a judge found it in 100.0 % before and in 0.0 % after, of 150 pictures; asked for" in text
    assert "asked for neon style, a judge found it in 98.0 % before and in 96.0 % after, of 50 pictures; what" in text
    assert "| concepts neon style | 98.0 | 96.0 |" in text


def test_card_tells_what_the_concept_was_taken_for(tmp_path: Path) -> None:
    understood = [(f"a cat {i}", f"a dog | {i}") for i in range(10)]
    text = a_card(tmp_path, understood=understood, shown=["a cat on grass"])
    assert "\n|---|---|\n| a cat 0 | a dog &#124; 0 |\n" in text
    assert "a cat 8" not in text
    assert "and 2 more captions" in text
    assert "* a cat on grass\n" in text


def test_card_names_the_rules_of_its_scores(tmp_path: Path) -> None:
    protocol = {"judge_sha256": "abc", "steps": 20, "concepts": [["object", "cat"], ["style", "neon"]]}
    text = a_card(tmp_path, scores=SCORES | {"protocol": protocol})
    assert "Protocol: judge sha256 abc; steps 20; concepts object cat, style neon." in text


def test_a_card_without_scores_claims_nothing_and_says_how_to_measure(tmp_path: Path) -> None:
    text = a_card(tmp_path, scores=None)
    assert "Whether it still draws cat was **not measured**" in text
    assert "a judge found" not in text
    assert "<code>python -m eval.generate --model 'a&lt;b'" in text
    half = {name: value for name, value in SCORES.items() if name != "retain"}
    assert "what became of the rest was **not measured**" in a_card(tmp_path, scores=half)


@pytest.mark.parametrize(
    ("model", "concept", "judge"),
    [
        ("pocket", "cat", "eval.concepts gen/erased --baseline gen/base --concept cat"),
        ("org/sd", "nudity", "eval.nudity gen/base gen/erased --baseline gen/base"),
        ("org/sd", "naked people", "eval.nudity gen/base gen/erased --baseline gen/base"),
        ("org/sd", "Van Gogh", "eval.grid --folders gen/base gen/erased"),
    ],
)
def test_the_commands_that_measure_are_commands(model: str, concept: str, judge: str) -> None:
    base, erased, last = measuring_commands([concept], model, "unet", "runs/x").splitlines()
    assert last == f"python -m {judge}"
    for line in (base, erased):
        given = parse(shlex.split(line)[3:], prog="", description="", generation=Generation)["generation"]
        assert given["model"] == model
    assert given["unet"] == "runs/x"


def test_no_path_of_this_machine_is_in_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable(str(tmp_path / "runs" / "cat")) == "runs/cat"
    assert portable("/home/me/models/sd") == "sd"
    assert portable("org/sd") == "org/sd"
    assert portable(0.5) == 0.5
    text = a_card(tmp_path, model="/home/me/models/sd", knobs={"model_config": "/home/me/base"})
    assert "/home/me" not in text
    assert "erased from sd" in text


def test_the_licence_is_the_base_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert license_of("pocket")["license"] == "cc-by-4.0"
    unknown = license_of("org/some-model")
    assert unknown["license"] == "other"
    assert unknown["license_link"] == "https://huggingface.co/org/some-model"
    assert license_of(str(tmp_path)) == {"license": "other", "license_name": "that-of-the-base-model"}
    (tmp_path / "model_index.json").write_text('{"_name_or_path": "org/flux"}')
    assert license_of(str(tmp_path))["license_link"] == "https://huggingface.co/org/flux"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: flux-dev\n---\n# Flux\n")
    assert license_of(str(tmp_path)) == {"license": "other", "license_name": "flux-dev"}
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(str(tmp_path))["license"] == "other"
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "card.md"))
    assert license_of("org/cached")["license"] == "mit"
    text = a_card(tmp_path, license=unknown)
    assert yaml.safe_load(text.split("---")[1])["license_link"] == unknown["license_link"]


def test_the_embedded_model_names_no_folder_of_another_machine() -> None:
    for file in [*FOLDER.rglob("*config.json"), FOLDER / "model_index.json"]:
        text = file.read_text(encoding="utf-8")
        assert '"/' not in text, file


def test_pocket_card_claims_no_hub_base(tmp_path: Path) -> None:
    text = a_card(tmp_path, model="pocket", license={"license": "mit"})
    assert "base_model:" not in text
    assert "Not validated on SD v1.4" not in text


def test_card_does_not_execute_what_users_type(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|`x`\n# [y](z) {{ 7 * 7 }}"
    text = a_card(tmp_path, concepts=[evil], knobs={"anchor": evil}, command=f"train --concept '{evil}'")
    assert "<script>" not in text
    assert "\n# [y]" not in text
    assert "{{ 7 * 7 }}" in text
    assert yaml.safe_load(text.split("---")[1])["license"]


def test_inert_shows_plain_words_as_they_are() -> None:
    assert inert("a cat, neon style 50 %") == "a cat, neon style 50 %"


def test_snippet_is_python_and_loads_the_swap(tiny_sd: Path, tiny_pipe, tmp_path: Path) -> None:
    tiny_pipe.unet.save_pretrained(str(tmp_path / "it's" / "unet"))
    names: dict = {}
    exec(swap_in_snippet(tiny_pipe, str(tiny_sd), tmp_path / "it's"), names)
    assert names["pipe"].unet.config.cross_attention_dim == 32


def test_paths_in_a_list_are_portable_too(tmp_path: Path):
    assert portable([str(tmp_path / "a.safetensors"), "b.safetensors@0.5"]) == ["a.safetensors", "b.safetensors@0.5"]
