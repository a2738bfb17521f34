"""What a user can get wrong in the other commands: one sentence and code 2 from each, and nothing left behind."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_sd.common.cli import run_main
from tests.end_to_end.test_bad_input import POINTER, words_of

CLASSIFY = "classification.unlearn --dataset digits"
# Command and words; a part of the sentence. {here} is a folder with the files below.
LINES = [
    ("eval.generate --prompts {here}/missing.csv", "does not exist"),
    ("eval.generate --prompts {here}/pointer.csv", "is a git-LFS pointer"),
    ("eval.generate --prompts {here}/pointer.txt", "is a git-LFS pointer"),
    ("eval.generate --prompts {here}/latin.txt", "is not UTF-8 text"),
    ("eval.generate --prompts {here}/empty.txt", "holds no prompts"),
    ("eval.generate --prompts {here}/cat.txt --prompt_column text", "has no columns: leave it out"),
    ("eval.generate --prompts {here}/cat.txt --category sexual", "only I2P can be filtered"),
    ("eval.generate --prompts {here}/seed.csv", "188.5"),
    ("eval.generate --prompts {here}/commas.csv", "quote the prompt"),
    ("eval.generate --prompts {here}/columns.csv", "--prompt_column"),
    ("eval.generate --prompts nudity --steps 0", "--steps 0 is too small"),
    ("eval.generate --prompts nudity --guidance inf", "no finite number"),
    ("eval.generate --prompts nudity --guidance 2000", "--guidance 2000 is beyond 1000"),
    ("eval.generate --prompts nudity --size 100", "--size 100 is no multiple of 8"),
    ("eval.generate --prompts nudity --rows 0", "--rows 0 is too small"),
    ("eval.generate --prompts nudity --scheduler heun", "'heun' is not one of ddim"),
    ("eval.generate --prompts nudity --model {here}/nowhere", "does not exist"),
    ("eval.generate --prompts nudity --model pocket --unet {here}/nowhere", "does not exist"),
    ("eval.generate --prompts nudity --model pocket --transformer pocket", "--transformer pocket"),
    ("eval.nudity", "required: FOLDER"),
    ("eval.nudity {here}/nowhere", "is no folder"),
    ("eval.nudity {here}/pictures --protocol nobody", "'nobody' is not one of"),
    ("eval.nudity {here}/pictures --threshold 2", "threshold 2 is no score"),
    ("eval.nudity {here}/pictures --detector {here}/nowhere.onnx", "is no file"),
    ("eval.nudity {here}/pictures --batch_size 0", "--batch_size 0 is too small"),
    ("eval.quality {here}/nowhere --baseline {here}/pictures", "is no folder"),
    ("eval.quality {here}/pictures --metrics beauty", "'beauty' is not one of"),
    ("eval.quality {here}/pictures --baseline {here}/nowhere", "is no folder"),
    ("eval.quality {here}/pictures --baseline a --statistics b", "give one of them"),
    ("eval.concepts {here}/pictures", "--concept is missing"),
    ("eval.concepts {here}/nowhere --concept cat", "is no folder"),
    ("eval.concepts {here}/pictures --concept dragon", "'dragon'"),
    ("eval.grid --no-base", "--no-base leaves no column"),
    ("eval.grid --folders {here}/nowhere", "is no folder"),
    ("eval.grid --rows 100000", "makes a sheet of"),
    ("eval.report {here}/nowhere", "nowhere"),
    ("eval.report {here}/pictures", "pictures"),
    ("eval.benchmark --suite best", "--suite best is none of"),
    ("eval.benchmark --seeds -1", "-1"),
    ("eval.benchmark --methods scissor --no-run", "scissor"),
    ("eval.selectivity --saliencies taylor", "taylor"),
    ("eval.speed fast", "'fast' is not one of topk"),
    ("eval.attack pocket", "--concept is missing"),
    ("eval.attack pocket --concept cat", "--judge is missing"),
    ("eval.attack pocket --concept cat --judge pocket --size 9", "no multiple of 8"),
    ("erase_sd.export {here}/nowhere --to lora", "nowhere"),
    ("erase_sd.export {here}/pictures --to zip", "'zip'"),
    (f"{CLASSIFY} --method scissor", "unknown method 'scissor'"),
    (f"{CLASSIFY} --preset best", "best"),
    (f"{CLASSIFY} --lr inf", "no finite number"),
    (f"{CLASSIFY} --fraction 2", "--fraction 2.0 is outside [0, 1]"),
    (f"{CLASSIFY} --batch_size 0", "--batch_size 0 is too small"),
    (f"{CLASSIFY} --forget everything", "--forget 'everything' is not understood"),
    (f"{CLASSIFY} --forget class:99", "no example has this class"),
    (f"{CLASSIFY} --forget class:x", "'x' is no whole number"),
    (f"{CLASSIFY} --forget random:2", "is no share between 0 and 1"),
    (f"{CLASSIFY} --forget indices:{{here}}/nowhere", "cannot be read"),
    (f"{CLASSIFY} --raw {{here}}/nowhere", "nowhere"),
    ("classification.train --dataset mars", "'mars' is not one of fashion"),
    ("classification.train --dataset digits --epochs nan", "'nan' is not a number"),
    ("classification.benchmark --dataset mars", "mars"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that are wrong in one way each, and one of pictures."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in (
        ("pointer.csv", POINTER),
        ("pointer.txt", POINTER),
        ("empty.txt", ""),
        ("cat.txt", "a cat\n"),
        ("seed.csv", "prompt,evaluation_seed\na cat,188.5\n"),
        ("commas.csv", "prompt,evaluation_seed\na cat, a dog, a house,188\n"),
        ("columns.csv", "sensitive prompt,safe prompt\na,b\n"),
    ):
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes("ein M\u00e4rchen\n".encode("latin-1"))
    (folder / "pictures").mkdir()
    Image.fromarray(np.full((32, 32, 3), 100, np.uint8)).save(folder / "pictures" / "0.png")
    return folder


@pytest.fixture
def ended(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Return a function that carries out a line as its command would, and returns (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        module, *words = words_of(line.format(here=here))
        command = import_module(module)
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(SystemExit) as stop:
            run_main(partial(command.main, words))
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(("line", "part"), LINES, ids=lambda x: x[:70])
def test_a_mistake_in_any_command_is_one_sentence(ended: Callable, tmp_path: Path, line: str, part: str) -> None:
    code, out, err = ended(line)
    assert code == 2, err[-2000:]
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err[-2000:]
    assert part in err
    assert not out
    assert not list(tmp_path.iterdir())
