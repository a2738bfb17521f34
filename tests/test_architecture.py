"""The shape of the code: who may import whom, what a file may be called, and how long things may get.

`MAY_IMPORT` is the whole design in one table. The longest matching name decides, for the importer and the imported; a
package may import itself. Runtime and options are the floor that everybody stands on and need no mention.
"""

import ast
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("erase_sd", "classification", "eval", "prompts")
FLOOR = {"erase_sd.process", "erase_sd.runtime", "erase_sd.common.cli", "erase_sd.common.processes"}
FLOOR |= {"erase_sd.common.processes", "erase_sd.run.checkpoints"}

MODELS = {
    *("erase_sd.models.pipeline", "erase_sd.models.families", "erase_sd.models.noise"),
    *("erase_sd.models.parameters", "erase_sd.models.checks", "erase_sd.models.guidance", "erase_sd.models.pipeline"),
}
SETTINGS = {"erase_sd.knobs", "erase_sd.presets", "erase_sd.plan"}
RECORDS = {"erase_sd.run.record", "erase_sd.denoising.card", "erase_sd.plots", "erase_sd.common.imaging"}
JUDGES = {*MODELS, *RECORDS, "erase_sd.knobs", "erase_sd.pocket", "prompts"}
MAY_IMPORT: dict[str, set[str]] = {
    "prompts": set(),
    "erase_sd": {"erase_sd.api"},
    "erase_sd.process": set(),
    "erase_sd.runtime": {"erase_sd.process"},
    "erase_sd.run.checkpoints": set(),
    "erase_sd.common.processes": set(),
    "erase_sd.common.cli": set(),
    "erase_sd.common.cli": set(),
    "erase_sd.common.processes": set(),
    "erase_sd.common.processes": set(),
    "erase_sd.presets": set(),
    "erase_sd.knobs": {"erase_sd.core"},
    "erase_sd.plan": {*SETTINGS, "erase_sd.methods"},
    "erase_sd.common.imaging": set(),
    "erase_sd.models.placement": set(),
    "erase_sd.models.parameters": set(),
    "erase_sd.models.families": set(),
    "erase_sd.models.noise": set(),
    "erase_sd.models.pipeline": set(),
    "erase_sd.models.checks": {"erase_sd.models.families"},
    "erase_sd.core": set(),
    "erase_sd.models.guidance": set(),
    "erase_sd.methods": {"erase_sd.core", "erase_sd.models.guidance"},
    "erase_sd.models.pipeline": {"erase_sd.models.checks", "erase_sd.models.families", "erase_sd.models.guidance"},
    "erase_sd.denoising.card": {"erase_sd.models.families", "erase_sd.models.guidance"},
    "erase_sd.plots": set(),
    "erase_sd.run.record": RECORDS,
    "erase_sd.denoising.samples": set(),
    "erase_sd.denoising.samples": {*MODELS, "erase_sd.knobs", "erase_sd.denoising.samples", "prompts"},
    "erase_sd.denoising.task": {
        "erase_sd.models.families",
        "erase_sd.knobs",
        "erase_sd.models.noise",
        "erase_sd.denoising.samples",
    },
    "erase_sd.denoising.task": {
        *MODELS,
        "erase_sd.knobs",
        "erase_sd.core",
        "erase_sd.denoising.task",
        "erase_sd.denoising.samples",
    },
    "erase_sd.denoising.sharded": {"erase_sd.denoising.task"},
    "erase_sd.pocket": {*MODELS, "erase_sd.common.imaging", "prompts"},
    "erase_sd.run.folder": {"erase_sd.run.record"},
    "erase_sd.run.loop": {"erase_sd.core", "erase_sd.run.folder"},
    "erase_sd.denoising.concept": {
        *MODELS,
        "erase_sd.knobs",
        "erase_sd.denoising.samples",
        "erase_sd.pocket",
        "prompts",
    },
    "erase_sd.denoising.results": {
        *MODELS,
        *RECORDS,
        *SETTINGS,
        "erase_sd.run.folder",
        "erase_sd.pocket",
        "erase_sd.denoising.concept",
    },
    "erase_sd.api": {
        *MODELS,
        *RECORDS,
        *SETTINGS,
        *(
            "erase_sd.core",
            "erase_sd.methods",
            "erase_sd.denoising.samples",
            "erase_sd.denoising.task",
            "erase_sd.denoising.sharded",
            "erase_sd.pocket",
            "prompts",
        ),
        *(
            "erase_sd.run.folder",
            "erase_sd.run.loop",
            "erase_sd.denoising.concept",
            "erase_sd.denoising.results",
            "erase_sd.models.placement",
        ),
        "erase_sd.denoising.sharded",
    },
    "erase_sd.dry_run": {*MODELS, *SETTINGS, "erase_sd.denoising.concept"},
    "erase_sd.train": {
        *SETTINGS,
        "erase_sd.methods",
        "erase_sd.api",
        "erase_sd.models.pipeline",
        "erase_sd.denoising.card",
    }
    | {"erase_sd.dry_run"}
    | {"erase_sd.pocket", "prompts"},
    "classification": {*RECORDS, "erase_sd.core", "erase_sd.methods", "erase_sd.run.folder", "erase_sd.run.loop"},
    "eval": JUDGES,
    "eval.suite": {*JUDGES, "eval", "erase_sd.plan", "erase_sd.presets"},
    "eval.benchmarking.trial": {*JUDGES, "eval", "eval.suite"},
    "eval.benchmarking.aggregate": {*JUDGES, "eval", "eval.suite", "eval.benchmarking.trial"},
    "eval.benchmarking.tables": {*JUDGES, "eval", "eval.suite", "eval.benchmarking.aggregate"},
    "eval.benchmarking.tables": {*JUDGES, "eval", "eval.suite", "eval.benchmarking.aggregate"},
    "eval.benchmarking.plots": {
        *JUDGES,
        "eval",
        "eval.suite",
        "eval.benchmarking.trial",
        "eval.benchmarking.aggregate",
    },
    "eval.benchmark": {
        *JUDGES,
        "eval",
        "eval.suite",
        "eval.benchmarking.trial",
        "eval.benchmarking.aggregate",
        "eval.benchmarking.tables",
    }
    | {"eval.benchmarking.plots", "eval.benchmarking.tables"},
    "eval.selectivity": {
        "eval",
        *MODELS,
        "erase_sd.core",
        "erase_sd.denoising.task",
        "erase_sd.denoising.samples",
        "erase_sd.denoising.concept",
    }
    | {"erase_sd.plan", "erase_sd.pocket"},
    "eval.selectivity": {"eval.selectivity", "erase_sd.knobs"},
    "eval.speed": {"eval.speeds"},
    "eval.speeds": {
        "eval",
        *MODELS,
        "erase_sd.knobs",
        "erase_sd.core",
        "erase_sd.denoising.task",
        "erase_sd.denoising.samples",
    }
    | {"erase_sd.pocket", "erase_sd.train", "erase_sd.api"},
}
LIBRARIES: dict[str, set[str]] = {  # the only third-party packages these may import; the others are free
    "prompts": set(),
    "erase_sd": set(),
    "erase_sd.common.cli": set(),
    "erase_sd.train": set(),
    "erase_sd.process": set(),
    "erase_sd.common.processes": set(),
    "erase_sd.common.cli": {"diffusers", "transformers"},
    "erase_sd.common.processes": {"torch", "accelerate"},
    "erase_sd.runtime": {"torch"},
    "erase_sd.run.checkpoints": {"torch", "safetensors"},
    "erase_sd.knobs": set(),
    "erase_sd.presets": set(),
    "erase_sd.plan": set(),
    "erase_sd.models.parameters": {"torch"},
    "erase_sd.denoising.samples": {"torch"},
    "erase_sd.models.guidance": {"torch", "safetensors", "huggingface_hub"},
    "erase_sd.core": {"torch", "numpy"},
    "erase_sd.core.optimizers": {"torch", "bitsandbytes"},
    "erase_sd.methods": {"torch"},
    "erase_sd.common.imaging": {"PIL", "matplotlib"},
}
NEVER = {"torchvision", "timm"}
SHADOWED = {*sys.stdlib_module_names, "prompts", "eval", "datasets", "classification", "diffusers"}

SOURCES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
EVERYTHING = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def row(module: str, table: dict[str, set[str]]) -> str | None:
    """The longest name in the table that is the module or one of its parents; erase_sd is nobody's parent."""
    names = [name for name in table if module == name or (module.startswith(f"{name}.") and name != "erase_sd")]
    return max(names, key=len, default=None)


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, at the top or inside a function."""
    package = [*module_name(path).split("."), "_"][: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: -node.level], node.module or ""]) if node.level else node.module
            yield from (f"{base.rstrip('.')}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_imports_point_one_way(path: Path):
    importer = row(module_name(path), MAY_IMPORT)
    assert importer, f"{label(path)} has no row in MAY_IMPORT: decide which floor it stands on"
    allowed = MAY_IMPORT[importer] | FLOOR | {importer}
    for target in imports(path):
        if target.split(".")[0] in OURS:
            assert row(target, MAY_IMPORT) in allowed, f"{label(path)} must not import {target}"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_libraries_stay_where_they_belong(path: Path):
    libraries = {target.split(".")[0] for target in imports(path)} - {*OURS, *sys.stdlib_module_names}
    assert not libraries & NEVER
    if place := row(module_name(path), LIBRARIES):
        assert libraries <= LIBRARIES[place]


def test_no_module_of_erase_sd_hides_another():
    """`accelerate launch erase_sd/train.py` puts erase_sd/ first on the module search path."""
    names = {path.stem for path in (ROOT / "erase_sd").glob("[!_]*") if path.is_dir() or path.suffix == ".py"}
    assert not names & SHADOWED


def test_importing_erase_sd_is_light():
    code = "import erase_sd, sys; print(*{'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("path", EVERYTHING, ids=label)
def test_files_and_functions_fit_on_a_screen(path: Path):
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= 200 or path not in SOURCES, f"{label(path)} has {lines} lines, more than 200"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 40, f"{node.name} in {label(path)} is longer than 40 lines"
        if isinstance(node, ast.ExceptHandler):
            assert node.type, f"bare except in {label(path)}:{node.lineno}"


@pytest.mark.parametrize("path", sorted((ROOT / "erase_sd" / "methods").glob("*.py")), ids=label)
def test_a_method_is_at_most_60_lines_of_code(path: Path):
    assert len(lines_of_code(path)) <= 60


def lines_of_code(path: Path) -> set[int]:
    """The numbers of the lines that hold code: blank lines, comments and docstrings do not count."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with path.open(encoding="utf-8") as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in layout]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return code
