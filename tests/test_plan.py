"""From options to a plan: presets, what beats them, and what is refused before anything happens."""

import json
from dataclasses import fields

import pytest

from erase_sd.common.cli import names, parse
from erase_sd.common.errors import UserError
from erase_sd.methods import METHODS, PRESETS
from erase_sd.plan import Plan, groups, make, values
from erase_sd.settings import SD_V1, Job, Sampling, TaskSettings
from erase_sd.train import _with_folder, main

EVERY = [(method, preset) for method in PRESETS for preset in PRESETS[method]]


def test_the_preset_follows_the_model() -> None:
    assert make(concept="cat").job.preset == "sd"
    assert make(concept="cat").job.model == SD_V1
    assert make(concept="cat", model="pocket").job.preset == "pocket"
    assert make(concept="cat", model="pocket", preset="paper").job.preset == "paper"


@pytest.mark.parametrize(("method", "preset"), EVERY)
def test_every_preset_builds_and_holds_nothing_but_knobs(method: str, preset: str) -> None:
    plan = make(concept="cat", method=method, preset=preset)
    held = {name: value for part in plan for name, value in vars(part).items()}
    for name, value in PRESETS[method][preset].items():
        assert name in set().union(*map(names, groups(method).values())), f"{preset} sets {name}, which is no knob"
        assert held[name] == value


@pytest.mark.parametrize("method", METHODS)
def test_no_two_dataclasses_share_a_knob(method: str) -> None:
    """`make` takes flat values: one of two would be lost."""
    found = [field.name for cls in groups(method).values() for field in fields(cls)]
    assert len(found) == len(set(found))
    assert set(PRESETS) == set(METHODS)


def test_the_paper_preset_is_the_paper() -> None:
    plan = make(concept="cat", preset="paper")
    method = plan.method
    assert (method.saliency, method.objective, method.constraint) == ("signed", "ascent", "forget")
    assert (method.projection, method.optimizer, method.init) == ("on", "sgd", "uniform")
    assert (method.margin, method.ridge, method.strict, method.forget_ceiling) == (0, 0, False, None)
    assert (plan.losses.trim_scope, plan.losses.train_scope) == ("full", "full")


@pytest.mark.parametrize("preset", ["authors-nsfw", "authors-cls"])
def test_salun_has_the_released_rate(preset: str) -> None:
    """Adam divides the factor of the loss out: the rate is not to be rescaled with it."""
    assert make(concept="cat", method="salun", preset=preset).method.lr == 1e-5


def test_bf16_weights_keep_what_rounding_loses_unless_told_otherwise() -> None:
    assert make(concept="cat").method.rounding == "nearest"
    assert make(concept="cat", weights_dtype="bfloat16").method.rounding == "kahan"
    assert make(concept="cat", weights_dtype="bfloat16", rounding="stochastic").method.rounding == "stochastic"
    assert make(concept="cat", method="uce", weights_dtype="bfloat16").method.rounding == "nearest"  # takes no steps


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--model pocket", ["adamw", "0.00015", "redirect", "300"]),
        ("--pretrained_model_name_or_path pocket --method esd", ["4.0", "200", "xattn"]),
        ("--method scissorhands --preset authors-nsfw", ["kaiming", "1e-05", "summed"]),
        ("", ["adamw", "redirect", "0.5"]),
    ],
)
def test_help_shows_what_would_run(words: str, shown: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for value in shown:
        assert f"(default: {value})" in text


@pytest.mark.parametrize("method", METHODS)
def test_values_are_those_of_the_plan(method: str) -> None:
    plan = make(concept="cat", method=method, model="pocket")
    for name, value in values(method, "pocket", None).items():
        assert {name: value}.items() <= {n: v for part in plan for n, v in vars(part).items()}.items()


def test_what_is_given_beats_the_preset_and_the_preset_beats_the_default() -> None:
    plan = make(concept="cat", preset="authors-nsfw", lr=0.5, trim_scope="kv", forget_images=3)
    assert (plan.method.lr, plan.losses.trim_scope, plan.sampling.forget_images) == (0.5, "kv", 3)
    assert plan.method.init == "kaiming"
    assert METHODS["scissorhands"]().init == "uniform"
    assert plan.sampling.retain_images == Sampling().retain_images


def test_a_value_of_none_is_a_value() -> None:
    assert make(concept="cat", preset="authors-nsfw", rank_scope=None).losses.rank_scope is None


def test_concepts_may_be_one_text_or_several() -> None:
    assert make(concept="cat").job.concept == ("cat",)
    assert make(concept=["cat", "neon style"]).job.concept == ("cat", "neon style")


WRONG = [
    ({}, "concept is empty"),
    ({"concept": ()}, "concept is empty"),
    ({"concept": ""}, "concept is empty"),
    ({"concept": ("cat", "  ")}, "concept is empty"),
    ({"method": "scissor"}, "unknown method 'scissor'.*scissorhands"),
    ({"preset": "pepar"}, "unknown preset 'pepar'.*paper, authors-nsfw, authors-cls"),
    ({"learning": 1}, "no knob 'learning'"),
    ({"fraction": 1.5}, r"--fraction 1.5 is outside \[0, 1\]"),
    ({"fraction": -0.1}, "fraction -0.1"),
    ({"fraction": float("nan")}, "fraction nan"),
    ({"drop_captions": 1.01}, r"--drop_captions 1.01 is outside \[0, 1\]"),
    ({"lam": -1.0}, "lam -1"),
    ({"lr": -1e-5}, "lr -1e-05"),
    ({"steps": -1}, "steps -1"),
    ({"seed": -1}, "seed -1"),
    ({"eval_retain": -5}, "eval_retain -5"),
    ({"checkpointing_steps": 0}, "checkpointing_steps 0"),
    ({"forget_images": 0}, "forget_images 0"),
    ({"retain_images": 0}, "retain_images 0"),
    ({"sample_steps": 0}, "sample_steps 0"),
    ({"sample_batch_size": 0}, "sample_batch_size 0"),
    ({"sample_guidance": -2.0}, "sample_guidance -2"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"redirect_draws": 0}, "redirect_draws 0"),
    ({"sensitivity_batches": 0}, "sensitivity_batches 0"),
    ({"saliency": "abss"}, "--saliency 'abss' is none of abs, signed, summed, guided, contrast"),
    ({"objective": "redirekt"}, "--objective 'redirekt'"),
    ({"anchor_model": "old"}, "--anchor_model 'old'"),
    ({"anchor_model": "current"}, "scissorhands learns from the original network: give --anchor_model original"),
    ({"kind": "colour"}, "--kind 'colour'"),
    ({"mixed_precision": "fp8"}, "--mixed_precision 'fp8'"),
    ({"max_grad_norm": float("inf")}, "--max_grad_norm inf is no finite number"),
    ({"ridge": float("inf")}, "--ridge inf"),
    ({"lr": float("inf")}, "--lr inf"),
    ({"milestones": (0.5, float("inf"))}, "--milestones inf"),
    ({"lr": "1e-4"}, "--lr '1e-4' is no number"),
    ({"lr": True}, "--lr True is no number"),
    ({"lr": None}, "--lr None is no number"),
    ({"steps": 2.5}, "--steps 2.5 is no whole number"),
    ({"fsdp": "no"}, "--fsdp 'no' is no truth value"),
    ({"milestones": 0.5, "method": "esd"}, "--milestones 0.5 is no list"),
    ({"milestones": "0.5"}, "--milestones '0.5' is no list"),
    ({"max_grad_norm": 0.0}, "--max_grad_norm 0"),
    ({"milestones": (5.0,)}, "--milestones 5"),
    ({"momentum": 5.0}, "--momentum 5"),
    ({"warmup_steps": 9, "steps": 8}, "--warmup_steps 9 is more than the 8 steps"),
    ({"model_config": "/nope", "model": "some/folder"}, "--model_config is of a model in a single file"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_wrong_value_is_one_sentence(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**{"concept": "cat"} | given if given else {})


def test_the_names_of_diffusers_training_scripts_are_known() -> None:
    words = "--learning_rate 1e-4 --max_train_steps 7 --lr_scheduler cosine --lr_warmup_steps 2 --train_batch_size 3"
    given = parse(words.split(), prog="", description="", **groups("scissorhands"))
    assert given["method"] == {"lr": 1e-4, "steps": 7, "schedule": "cosine", "warmup_steps": 2}
    assert given["losses"] == {"batch_size": 3}


def test_no_score_is_no_other_run_and_is_in_its_command() -> None:
    plan = make(concept="cat", model="pocket", score=False)
    assert plan.config() == make(concept="cat", model="pocket").config()
    assert "score" not in plan.config()
    assert plan.options()[-1] == "--no-score"


def test_two_methods_have_two_folders_for_one_concept() -> None:
    folders = [_with_folder(make(concept="neon style", method=name)).job.output_dir for name in ("uce", "esd")]
    assert folders == ["runs/neon-style-uce", "runs/neon-style-esd"]
    assert _with_folder(make(concept="cat", output_dir="here")).job.output_dir == "here"
    by_path = make(concept="/home/me/concepts/grumpy.json", method="uce")
    assert _with_folder(by_path).job.output_dir == "runs/grumpy-uce"


def test_what_is_left_to_the_family_is_what_it_always_was_for_stable_diffusion() -> None:
    """Runs and published rows of before are found again."""
    config = make(concept="cat").config()
    assert (config["sample_guidance"], config["sample_steps"], config["picture_steps"]) == (7.5, 20, 30)
    assert make(concept="cat", sample_guidance=7.5, sample_steps=20, picture_steps=30).config() == config
    flux = {"sample_guidance": 3.5, "sample_steps": 28, "picture_steps": 28}
    assert make(concept="cat").config(flux) == config | flux
    assert make(concept="cat", sample_steps=9).config(flux) == config | flux | {"sample_steps": 9}


@pytest.mark.parametrize(("method", "samples"), [("uce", 0), ("sld", 0), ("finetune", 32)])
def test_a_method_that_computes_no_samples_shows_no_rate_of_them(method: str, samples: int) -> None:
    assert make(concept="cat", method=method).step_samples() == samples


def test_without_a_trim_no_batch_is_needed() -> None:
    assert make(concept="cat", fraction=0, sensitivity_batches=0).method.fraction == 0


def test_the_configuration_survives_json_and_tells_results_apart() -> None:
    config = make(concept=("cat", "dog"), lr=1e-4).config()
    assert json.loads(json.dumps(config)) == config
    assert config["concept"] == ["cat", "dog"]
    assert config == make(concept=("cat", "dog"), lr=1e-4, preset="sd", output_dir="x", checkpointing_steps=7).config()
    assert config != make(concept=("cat", "dog"), lr=1e-4, seed=1).config()
    assert {*names(TaskSettings), *names(Sampling), *names(METHODS["scissorhands"])} <= set(config)


@pytest.mark.parametrize(
    "given",
    [
        {"concept": "cat", "model": "pocket"},
        {"concept": ("cat", "neon style"), "model": "pocket", "seed": 3, "output_dir": "a b/c"},
        {"concept": "nudity", "preset": "authors-nsfw", "strict": False, "rank_scope": None, "lr": 1e-7},
        {"concept": "x", "weights_dtype": "bfloat16"},
        {"concept": "x", "weights_dtype": "bfloat16", "rounding": "nearest"},
        {"concept": "x", "strict": True, "max_grad_norm": 1.0, "mixed_precision": "bf16", "checkpointing_steps": 3},
    ],
)
def test_the_options_of_a_plan_make_the_same_plan(given: dict) -> None:
    plan = make(**given)
    words = parse(plan.options(), prog="", description="", **groups(plan.job.method))
    again = make(**{name: value for values in words.values() for name, value in values.items()})
    assert isinstance(again, Plan)
    assert again == plan
    assert len(plan.options()) < 2 * len(fields(Job))  # only what the preset does not say
