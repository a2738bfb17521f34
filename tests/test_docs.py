"""The documentation says what is true: its commands parse, its links lead somewhere, its Python runs."""

import dataclasses
import importlib
import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from erase_sd import train
from erase_sd.common import cli
from erase_sd.common.errors import UserError
from erase_sd.pocket import FOLDER

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "mkdocs.yml")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGES = [page for page in PAGES if "warm_start" not in page.parts]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`((?:python|erase-sd|accelerate|make|pip) [^`\n]+)`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")
LAUNCHER = {"--num_processes", "--cpu", "--num_machines", "--mixed_precision"}  # options of accelerate launch


def commands(text: str) -> Iterator[str]:
    """Yield the command lines of a page's code, without comments; lines that end with a backslash go on."""
    for language, block in BLOCK.findall(text):
        if language in ("", "bash", "sh", "console"):
            yield from block.replace("\\\n", " ").splitlines()
    yield from SPAN.findall(BLOCK.sub("", text))


def words_of(line: str) -> list[str]:
    """Return the words of a command line; none for what is no command of a shell."""
    try:
        return shlex.split(re.sub(r"\.\.\.|\[[^\]]*\]|(?<=--method )[A-Z]\b", _filled_in, line), comments=True)
    except ValueError:
        return []


def _filled_in(blank: re.Match) -> str:
    """Return what stands for "...", for an optional part and for any method in a command that is to be parsed."""
    return "esd" if blank[0].isalpha() else ""


def ours(line: str) -> tuple[str, list[str]] | None:
    """Return the module and the arguments of one of our commands, None for another line."""
    words = words_of(line)
    if words[:2] == ["erase-sd", "export"]:
        return "erase_sd.export", words[2:]
    if words[:1] == ["erase-sd"]:
        return "erase_sd.train", words[1:]
    if words[:2] == ["accelerate", "launch"]:
        words = words[1:]
        while len(words) > 1 and words[1] in LAUNCHER:
            words = [words[0], *words[3:]]
    elif words[:1] != ["python"]:
        return None
    if words[1:2] == ["-m"] and len(words) > 2:
        return (words[2], words[3:]) if words[2].split(".")[0] in ("erase_sd", "eval", "classification") else None
    if len(words) > 1 and words[1].endswith(".py"):
        return words[1].removesuffix(".py").replace("/", "."), words[2:]
    return None


def all_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for line in commands(page.read_text(encoding="utf-8")):
            if ours(line):
                found.append((str(page.relative_to(ROOT)), line))
    return list(dict.fromkeys(found))


COMMANDS = all_commands()


class Parsed(Exception):
    """Raised in the place of the work, once the options are read and found in range."""


def read_only(*args: object, **options: object) -> None:
    """Read the options as the command does, make their dataclasses, and stop."""
    names = [name for name, value in options.items() if dataclasses.is_dataclass(value)]
    given = cli_parse(*args, **options)
    for name in names:
        required = [f for f in dataclasses.fields(options[name]) if f.default is dataclasses.MISSING]
        if not required or {f.name for f in required} <= given[name].keys():
            _made(options[name], given[name])
    raise Parsed


def _made(options: type, given: dict[str, object]) -> None:
    """Make the dataclass, whose ranges are checked then; that an example's file is not on this machine is no fault."""
    try:
        options(**given)
    except UserError as error:
        if "is no file" not in str(error):
            raise


cli_parse = cli.parse


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_of_the_docs_is_one(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, arguments = ours(line)
    if not arguments:
        assert importlib.util.find_spec(name), name
        return
    module = importlib.import_module(name)
    monkeypatch.setattr(cli, "parse", read_only)
    if hasattr(module, "parse"):
        monkeypatch.setattr(module, "parse", read_only)
    with pytest.raises((Parsed, SystemExit)) as stop:
        module.main(arguments)
    assert stop.type is Parsed or stop.value.code == 0  # --help


@pytest.mark.parametrize("line", ["erase-sd --concpt cat", "python -m eval.grid --rows 0 x", "erase-sd --steps many"])
def test_a_command_that_is_none_would_be_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, arguments = ours(line)
    module = importlib.import_module(name)
    monkeypatch.setattr(cli, "parse", read_only)
    if hasattr(module, "parse"):
        monkeypatch.setattr(module, "parse", read_only)
    with pytest.raises((SystemExit, UserError)) as stop:
        module.main(arguments)
    assert stop.type is UserError or stop.value.code == 2


def test_commands_are_found_at_all() -> None:
    assert len(COMMANDS) > 40
    assert ("README.md", "erase-sd --concept nudity --dry_run") in [(p, x.partition("  ")[0]) for p, x in COMMANDS]
    assert {"docs/export.md", "docs/demo.md", "docs/attack.md", "docs/compare.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_and_extras_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in commands(page.read_text(encoding="utf-8")):
        words = words_of(line)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\.\[([\w,]+)\]", line):
                assert extra in extras, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", str(menu)))
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert listed == there | {"contributing.md", "changes.md"}  # these two stand beside docs/


def test_ci_runs_on_every_python_that_is_promised() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["promises"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert {"run": ".ci/run"} in jobs["promises"]["steps"]


# Python


def python_blocks() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                found.append((str(page.relative_to(ROOT)), block))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take for granted: a run on the embedded model, by the fastest method."""
    folder = tmp_path_factory.mktemp("docs")
    words = ["--concept", "watermelon", "--model", "pocket", "--method", "uce", "--no-score"]
    assert train.main([*words, "--output_dir", str(folder / "runs/watermelon-uce")]) == 0
    shutil.copytree(folder / "runs/watermelon-uce", folder / "runs/nudity-scissorhands")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), python_blocks(), ids=[page for page, _ in python_blocks()])
def test_python_of_the_docs_runs(page: str, code: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, "argv", ["docs"])
    exec(code.replace("CompVis/stable-diffusion-v1-4", str(FOLDER)), {})


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    build = pytest.importorskip("mkdocs.__main__")
    from click.testing import CliRunner

    line = ["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(tmp_path / "site")]
    done = CliRunner().invoke(build.cli, line)
    assert done.exit_code == 0, done.output
    for page in (tmp_path / "site").rglob("*.html"):
        asked = re.findall(r'<(?:script|img)[^>]* src="(https?:[^"]*)"', page.read_text(encoding="utf-8"))
        assert asked == [], page
