"""The options: what is given comes back typed, what is not stays out, and a mistake costs one sentence."""

from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from erase_sd.common.cli import argument, assemble, filled, parse, peek, run_main
from erase_sd.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to erase from which model."""

    concept: tuple[str, ...] = field(metadata={"help": "what to erase"})
    model: str = field(default="pocket", metadata={"aliases": ("pretrained_model_name_or_path",)})
    output_dir: str | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to erase it."""

    fraction: float = field(default=5e-4, metadata={"help": "share of the entries, 0.05 % here"})
    saliency: Literal["abs", "signed"] = "abs"
    forget_ceiling: float | None = 2.0
    momentum: bool = False
    steps: Literal[10, 100] = 10
    betas: tuple[float, ...] = (0.9, 0.999)


def read(*argv: str) -> dict:
    return parse(argv, prog="erase", description="Erase a concept.", job=Job, options=Options)


def mistake(capsys: pytest.CaptureFixture, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        read("--concept", "cat", *argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_only_what_was_given_comes_back_so_a_preset_keeps_the_rest():
    given = read("--concept", "cat", "--fraction", "1e-3")
    assert given == {"job": {"concept": ("cat",)}, "options": {"fraction": 1e-3}}
    preset = Options(saliency="signed")
    assert replace(preset, **given["options"]) == Options(saliency="signed", fraction=1e-3)


def test_every_annotation_is_read_as_its_type():
    given = read(
        *("--concept", "cat", "neon style", "--seed", "7", "--saliency", "signed", "--steps", "100"),
        *("--momentum", "--betas", "0.5", "1", "--forget_ceiling", "3"),
    )
    assert given["job"] == {"concept": ("cat", "neon style"), "seed": 7}
    expected = Options(saliency="signed", steps=100, momentum=True, betas=(0.5, 1.0), forget_ceiling=3.0)
    assert Options(**given["options"]) == expected
    assert "fraction" not in given["options"]


@pytest.mark.parametrize("spelling", ["--output_dir", "--output-dir"])
@pytest.mark.parametrize("joint", [" ", "="])
def test_dashes_and_underscores_are_the_same(spelling: str, joint: str):
    given = read("--concept", "cat", *f"{spelling}{joint}runs/my_cat-1".split(" "))
    assert given["job"]["output_dir"] == "runs/my_cat-1"


def test_aliases_name_the_same_field():
    assert read("--concept", "cat", "--pretrained-model-name-or-path", "x")["job"]["model"] == "x"


def test_a_switch_can_be_turned_off_and_an_optional_value_emptied():
    options = read("--concept", "cat", "--no-momentum", "--forget-ceiling", "none")["options"]
    assert options == {"momentum": False, "forget_ceiling": None}
    assert read("--concept", "cat", "--no_momentum")["options"] == {"momentum": False}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--saliency", "taylor"], "error: --saliency: 'taylor' is not one of abs, signed\n"),
        (["--steps", "11"], "error: --steps: '11' is not one of 10, 100\n"),
        (["--fraction", "half"], "error: --fraction: 'half' is not a number\n"),
        (["--fraction", "inf"], "error: --fraction: 'inf' is no finite number: give one\n"),
        (["--betas", "0.5", "inf"], "error: --betas: 'inf' is no finite number: give one\n"),
        (["--fraction", "nan"], "error: --fraction: 'nan' is not a number\n"),
        (["--seed", "1.5"], "error: --seed: '1.5' is not a whole number\n"),
        (["--fractoin", "1"], "error: there is no option --fractoin; did you mean --fraction?\n"),
        (["--frac", "1"], "error: there is no option --frac; did you mean --fraction?\n"),
        (["--xyz=1"], "error: there is no option --xyz; see --help\n"),
        (["--seed"], "error: --seed: expected one argument\n"),
        (
            ["--seed", "1", "cat"],
            "error: 'cat' does not belong to any option; put quotes around a value with spaces\n",
        ),
    ],
)
def test_a_mistake_is_answered_with_one_sentence(capsys: pytest.CaptureFixture, argv: list[str], sentence: str):
    assert mistake(capsys, *argv) == sentence


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped: the same command"),
        (SystemExit(143), 143, "stopped: the same command"),
        (UserError("no\n cat"), 2, "error: no cat\n"),
        (SystemExit(2), 2, ""),
        (
            OSError(28, "No space left on device", "/full/run.json"),
            2,
            "error: /full/run.json cannot be used: No space",
        ),
        (FileExistsError(17, "File exists", "dangling"), 2, "error: dangling cannot be used: File exists"),
    ],
)
def test_whoever_ends_a_program_reads_one_sentence(
    capsys: pytest.CaptureFixture, outcome: BaseException, code: int, said: str
):
    def main() -> int:
        raise outcome

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    error = capsys.readouterr().err
    assert stop.value.code == code
    assert error.startswith(said)
    assert error.count("\n") == bool(said)


def test_python_has_types_and_finite_numbers_too():
    for values, message in (
        ({"fraction": "1e-4"}, "--fraction '1e-4' is no number"),
        ({"fraction": float("inf")}, "--fraction inf is no finite number"),
        ({"momentum": 1}, "--momentum 1 is no truth value"),
        ({"betas": (0.5, "x")}, "--betas 'x' is no number"),
    ):
        with pytest.raises(UserError, match=message):
            filled(Options, values)
    assert filled(Options, {"fraction": 1, "forget_ceiling": None, "betas": [0, 1]}).fraction == 1


def test_a_missing_required_option_is_named(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        read("--seed", "1")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --concept\n"


def test_help_shows_defaults_docstrings_and_percent_signs(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("How to erase it.", "0.05 % here (default: 0.0005)", "(default: 0.9 0.999)", "{abs,signed}"):
        assert part in text
    assert "what to erase (required)" in text
    assert "(default: off)" in text


def test_help_shows_the_values_of_a_preset(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse(["--help"], prog="erase", description="", preset={"fraction": 0.25, "of_another": 1}, options=Options)
    text = capsys.readouterr().out
    assert "(default: 0.25)" in text
    assert "(default: 0.0005)" not in text


def test_a_type_that_cannot_be_typed_in_is_the_programmers_error():
    @dataclass(frozen=True)
    class Odd:
        table: dict[str, int] = field(default_factory=dict)

    with pytest.raises(TypeError, match="dict"):
        parse([], prog="erase", description="", odd=Odd)


def test_peek_reads_one_option_among_unknown_ones():
    assert peek(["--concept", "cat", "--method", "esd", "--eta", "1"], "method", "scissorhands") == "esd"
    assert peek(["--concept", "cat"], "method", "scissorhands") == "scissorhands"


def test_peek_knows_the_other_names_of_an_option():
    words = ["--concept", "cat", "--pretrained-model-name-or-path", "pocket"]
    assert peek(words, "model", None, ("pretrained_model_name_or_path",)) == "pocket"
    assert peek(words, "preset") is None


def test_what_was_given_wins_over_the_preset_and_that_over_the_default():
    preset = {"fraction": 0.1, "momentum": True, "of_another_method": 1}
    job, options = assemble([Job, Options], preset, {"concept": ("cat",), "fraction": 0.2})
    assert job == Job(concept=("cat",))
    assert options == Options(fraction=0.2, momentum=True)


def test_a_given_value_that_is_no_option_is_named():
    with pytest.raises(UserError, match="there is no option 'fractoin' here: see --help"):
        assemble([Job, Options], {}, {"concept": ("cat",), "fractoin": 0.2})


def test_a_choice_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="--saliency 'taylor' is none of abs, signed"):
        assemble([Options], {}, {"saliency": "taylor"})


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What to look at."""

    folders: tuple[str, ...] = argument("folders of images")
    threshold: float = 0.6


def test_positional_arguments(capsys: pytest.CaptureFixture):
    given = parse(["a", "b/c", "--threshold", "0.5"], prog="judge", description="Judge.", job=Judge)
    assert given == {"job": {"folders": ("a", "b/c"), "threshold": 0.5}}
    with pytest.raises(SystemExit) as stop:
        parse([], prog="judge", description="Judge.", job=Judge)
    assert stop.value.code == 2
    assert "folders" in capsys.readouterr().err.lower()
