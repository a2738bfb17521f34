"""The architecture in one screen: who may import whom, why a file exists, and that a word means one thing.

A folder is a floor that answers one question. `MAY_IMPORT` is the whole design: the longest name that fits decides for
the importer and for what it imports; a room may import itself. Imports inside functions and under TYPE_CHECKING count.
Each rule is a function from a list of sources to the sentences that say where it is broken, so that the rules can be
tested as well.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("erase_sd", "classification", "eval", "prompts")

MODELS_UP = {"erase_sd.common", "erase_sd.models"}
MAY_IMPORT: dict[str, set[str]] = {
    "prompts": set(),
    "erase_sd.common": set(),
    "erase_sd.settings": {"erase_sd.common"},
    "erase_sd.core": {"erase_sd.common"},
    "erase_sd.models": {"erase_sd.common"},
    "erase_sd.run": {"erase_sd.common", "erase_sd.core"},
    "erase_sd.methods": {"erase_sd.common", "erase_sd.core", "erase_sd.models"},
    "erase_sd.plan": {"erase_sd.common", "erase_sd.settings", "erase_sd.methods"},
    "erase_sd.pocket": {"erase_sd.common", "erase_sd.models", "erase_sd.run", "prompts"},
    "erase_sd.denoising": {
        *("erase_sd.common", "erase_sd.settings", "erase_sd.plan", "erase_sd.core", "erase_sd.models"),
        *("erase_sd.run", "erase_sd.pocket", "prompts"),
    },
    "erase_sd.exports": {"erase_sd.common", "erase_sd.models"},
    "erase_sd": {"erase_sd.*", "prompts"},
    "eval.images": {*MODELS_UP, "erase_sd.pocket", "prompts"},
    "eval.judges": {"erase_sd.common", "erase_sd.pocket", "eval.images", "eval.features"},
    "eval.features": {"erase_sd.common", "erase_sd.pocket", "eval.images"},
    "eval.attacks": {
        *(*MODELS_UP, "erase_sd.settings", "erase_sd.denoising", "erase_sd.pocket", "prompts"),
        *("eval.images", "eval.judges", "eval.features"),
    },
    "eval.reporting": {"erase_sd.common", "eval.images", "eval.judges"},
    "eval.benchmarking": {
        *(*MODELS_UP, "erase_sd.pocket", "erase_sd.methods", "erase_sd.plan"),
        *("eval.images", "eval.judges", "eval.features"),
    },
    "eval.timing": {
        *(*MODELS_UP, "erase_sd.core", "erase_sd.pocket", "erase_sd.denoising", "erase_sd.settings", "erase_sd.plan"),
        *("erase_sd", "eval.images", "eval.judges"),
    },
    "eval": {"eval.*", "erase_sd.*", "prompts"},
    "classification.settings": {"erase_sd.common"},
    "classification.presets": {"erase_sd.common"},
    "classification.models": {"erase_sd.common"},
    "classification.data": {"erase_sd.common", "classification.settings"},
    "classification.metrics": {"erase_sd.common", "classification.data", "classification.settings"},
    "classification.task": {"erase_sd.common", "erase_sd.core", "classification.settings", "classification.data"},
    "classification.methods": {
        *("erase_sd.common", "erase_sd.core", "erase_sd.methods", "classification.data", "classification.task"),
    },
    "classification.plan": {
        *("erase_sd.common", "erase_sd.core", "erase_sd.methods"),
        *("classification.settings", "classification.presets", "classification.methods"),
    },
    "classification.run": {
        *("erase_sd.common", "erase_sd.run", "erase_sd.methods", "classification.plan", "classification.task"),
        *("classification.methods", "classification.settings", "classification.data", "classification.models"),
        *("classification.metrics",),
    },
    "classification.reporting": {"erase_sd.common", "classification.metrics"},
    "classification": {"classification.*", "erase_sd.common", "erase_sd.core", "erase_sd.methods"},
}
LATE = {  # slow or optional libraries, which a function may import: --help and other commands do without them
    *("diffusers", "transformers", "nudenet", "sklearn", "matplotlib", "onnxruntime", "datasets", "peft", "scipy"),
    *(
        "pandas",
        "jinja2",
        "markupsafe",
        "huggingface_hub",
        "bitsandbytes",
        "cv2",
        "resvg_py",
        "gradio",
        "starlette",
        "quadprog",
    ),
    *("tokenizers", "tensorboard", "torchmetrics", "numpy.lib.format"),
}
NEVER = {"torchvision", "timm"}  # cannot be imported beside the CPU build of torch
REGISTRIES = {  # folders whose files are entries of a registry: each is there for its own sake
    *("erase_sd.methods", "erase_sd.exports", "erase_sd.models.foreign", "eval.attacks", "eval.timing"),
    *("classification.methods", "classification.metrics", "classification.data.sources"),
}
FACE = {"erase_sd": 9, "eval": 12, "classification": 12}  # files directly in a package, at most
DENSITY = 3.0  # comprehensions in 100 lines, below
SHADOWED = {*sys.stdlib_module_names, "prompts", "eval", "datasets", "classification", "diffusers"}


@dataclass(frozen=True)
class Source:
    """One file: its module's name, whether it is a package's __init__, its text and its syntax tree."""

    module: str
    package: bool
    text: str
    tree: ast.Module

    def targets(self) -> Iterator[str]:
        """Yield what the file imports, with the imported name behind the module's."""
        parts = self.module.split(".")
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name
            elif isinstance(node, ast.ImportFrom):
                base = [node.module] if node.module else []
                if node.level:
                    up = node.level - 1 if self.package else node.level
                    base = [*parts[: len(parts) - up], *base]
                for alias in node.names:
                    yield ".".join([*base, alias.name])


def sources(root: Path) -> list[Source]:
    """Read every Python file of the four packages below a root."""
    found = []
    for package in OURS:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            inner = parts[-1] == "__init__"
            text = path.read_text(encoding="utf-8")
            module = ".".join(parts[:-1] if inner else parts)
            found.append(Source(module, inner, text, ast.parse(text)))
    return found


def room(module: str) -> str:
    """Return the row of MAY_IMPORT that a module belongs to: the longest name that is the module or above it."""
    names = [name for name in MAY_IMPORT if module == name or module.startswith(f"{name}.")]
    return max(names, key=len)


def internal(files: list[Source]) -> dict[str, set[str]]:
    """Return, for each module, the modules of ours that it imports."""
    modules = {file.module for file in files}
    graph: dict[str, set[str]] = defaultdict(set)
    for file in files:
        for target in file.targets():
            while target and target not in modules:
                target = target.rpartition(".")[0]
            if target and target != file.module:
                graph[file.module].add(target)
    return graph


def forbidden(files: list[Source]) -> list[str]:
    """Rule 1: imports that MAY_IMPORT does not have."""
    broken = []
    for importer, imported in internal(files).items():
        allowed = MAY_IMPORT[room(importer)]
        for target in sorted(imported):
            place = room(target)
            whole_package = f"{place.split('.')[0]}.*"
            if place != room(importer) and place not in allowed and whole_package not in allowed:
                broken.append(f"{importer} must not import {target}")
    return broken


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Rule 1: modules that reach themselves, each with the way."""
    done: set[str] = set()
    found: list[str] = []

    def walk(node: str, way: list[str]) -> None:
        if node in way:
            found.append(" -> ".join([*way[way.index(node) :], node]))
            return
        if node in done:
            return
        for target in sorted(graph.get(node, ())):
            walk(target, [*way, node])
        done.add(node)

    for start in sorted(graph):
        walk(start, [])
    return found


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the graph of rooms: a package's face, which may use all its rooms, stands apart from them."""
    joined: dict[str, set[str]] = defaultdict(set)
    for importer, imported in graph.items():
        for target in imported:
            if room(importer) != room(target):
                joined[room(importer)].add(room(target))
    return joined


def lonely(files: list[Source]) -> list[str]:
    """Rule 2: files with one importer that are no command, no entry of a registry and no reader of foreign bytes."""
    importers: dict[str, set[str]] = defaultdict(set)
    for importer, imported in internal(files).items():
        for target in imported:
            importers[target].add(importer)
    broken = []
    for file in files:
        parent = file.module.rpartition(".")[0]
        command = "__main__" in file.text
        if file.package or command or parent in REGISTRIES or parent in OURS or file.module in FOREIGN_BYTES:
            continue
        if len(importers[file.module]) < 2 and file.module not in NAMED_BY_THE_TREE:
            broken.append(f"{file.module} has {len(importers[file.module])} importers: make it part of its importer")
    return broken


FOREIGN_BYTES = {"classification.data.sources.unpickle", "erase_sd.run.checkpoints"}
NAMED_BY_THE_TREE: dict[str, str] = {  # one importer, and a question of its own
    "eval.images.writer": "one folder of images, resumable",
    "eval.features.metrics": "formulas from features to numbers",
    "erase_sd.denoising.answers": "the original model's answers, in its place",
    "erase_sd.denoising.sharded": "the only file that knows FSDP2",
    "erase_sd.denoising.results": "what a run leaves behind",
    "erase_sd.models.noise": "the forward process, as formulas",
    "erase_sd.models.activations": "what a backward pass needs kept, counted without a device",
    "erase_sd.models.placement": "which device holds what, and its way back",
    "erase_sd.run.loop": "the one loop",
    "erase_sd.run.plots": "needs matplotlib",
    "eval.benchmarking.tables": "Markdown and CSV of what was measured",
    "eval.benchmarking.trial": "one row, in a worker process",
    "eval.benchmarking.plots": "needs matplotlib",
    "eval.judges.review": "contact sheets of what a detector found",
    "eval.reporting.figure": "needs matplotlib",
    "eval.reporting.run_sections": "sections of runs",
    "eval.reporting.image_sections": "sections of images",
    "classification.models.pretrained": "weights from elsewhere, and what is refused of them",
    "classification.run.measure": "scores after a method",
    "classification.data.transforms": "crops and flips on tensors",
    "classification.reporting.figures": "needs matplotlib",
    "erase_sd.pocket.training.vae": "one part of the embedded model",
    "erase_sd.pocket.training.unet": "one part of the embedded model",
    "erase_sd.pocket.training.report": "scores of the embedded model",
}


def doubled(files: list[Source]) -> list[str]:
    """Rule 4: public classes and types of one name in two files."""
    places: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for node in file.tree.body:
            name = ""
            if isinstance(node, ast.ClassDef):
                name = node.name
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id if not node.targets[0].id.isupper() else ""
            if name and name[0].isupper():
                places[name].append(file.module)
    return [
        f"{name} means {len(where)} things: {', '.join(where)}" for name, where in places.items() if len(where) > 1
    ]


def hidden_imports(files: list[Source]) -> list[str]:
    """Function-level imports of anything but slow or optional libraries."""
    broken = []
    for file in files:
        for function in ast.walk(file.tree):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for node in ast.walk(function):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                for name in names:
                    if name.split(".")[0] not in LATE:
                        broken.append(f"{file.module}, {function.name}: import {name} at the top of the module")
    return broken


def density(files: list[Source], package: str) -> float:
    """Comprehensions in 100 lines of a package."""
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    inside = [file for file in files if file.module.split(".")[0] == package]
    lines = sum(file.text.count("\n") for file in inside)
    count = 0
    for file in inside:
        for node in ast.walk(file.tree):
            count += isinstance(node, kinds)
    return 100 * count / lines


FILES = sources(ROOT)


def test_imports_point_one_way():
    assert forbidden(FILES) == []


def test_no_module_reaches_itself():
    assert circles(internal(FILES)) == []


def test_no_room_reaches_itself():
    graph = rooms(internal(FILES))
    for package in OURS:  # a command uses what its own rooms offer; that no room imports a command is rule 1
        graph.pop(package, None)
    assert circles(graph) == []


def test_every_row_of_the_table_is_a_room():
    for name in MAY_IMPORT:
        place = ROOT / Path(*name.split("."))
        assert place.is_dir() or place.with_suffix(".py").is_file(), name


def test_a_file_exists_because_two_need_it():
    assert lonely(FILES) == []


def test_exceptions_are_needed():
    modules = {file.module for file in FILES}
    assert set(NAMED_BY_THE_TREE) | FOREIGN_BYTES <= modules


def test_a_word_means_one_thing():
    assert doubled(FILES) == []


def test_functions_import_slow_libraries_only():
    assert hidden_imports(FILES) == []


@pytest.mark.parametrize("package", FACE)
def test_a_package_shows_few_files(package: str):
    assert len(list((ROOT / package).glob("*.py"))) - 1 <= FACE[package]


@pytest.mark.parametrize("package", FACE)
def test_statements_say_one_thing(package: str):
    assert density(FILES, package) < DENSITY


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.module)
def test_no_library_that_cannot_be_there(file: Source):
    libraries = {target.split(".")[0] for target in file.targets()}
    assert not libraries & NEVER


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.module)
def test_no_rule_is_switched_off_for_style(file: Source):
    assert "noqa: E731" not in file.text
    assert "getattr(method," not in file.text
    for node in ast.walk(file.tree):
        assert not isinstance(node, ast.ExceptHandler) or node.type, f"bare except in line {node.lineno}"


def test_no_module_of_erase_sd_hides_another():
    """`accelerate launch erase_sd/train.py` puts erase_sd/ first on the module search path."""
    names = {path.stem for path in (ROOT / "erase_sd").glob("[!_]*") if path.is_dir() or path.suffix == ".py"}
    assert not names & SHADOWED


def test_importing_erase_sd_is_light():
    assert imported_by("import erase_sd", {"torch", "diffusers", "transformers"}) == ""


@pytest.mark.parametrize("command", ["erase_sd.train", "eval.generate", "eval.report", "classification.unlearn"])
def test_help_waits_for_torch_alone(command: str):
    code = f"import {command}"
    assert imported_by(code, {"diffusers", "transformers", "matplotlib", "sklearn"}) == ""


def imported_by(code: str, libraries: set[str]) -> str:
    """Return which of the libraries a fresh interpreter has loaded after the code."""
    code = f"import sys\n{code}\nprint(*sorted({libraries!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


# The rules themselves: each finds its fault in a tree that has it, and nothing in one that has not.


def tree(root: Path, **files: str) -> list[Source]:
    """Write modules, "__" for a dot in their names, and read them back."""
    for name, text in files.items():
        path = root / Path(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return sources(root)


SOUND = {"erase_sd__common__files": "x = 1\n", "erase_sd__core__trim": "from erase_sd.common.files import x\n"}


def test_a_sound_tree_breaks_no_rule(tmp_path: Path):
    files = tree(tmp_path, **SOUND)
    assert forbidden(files) == []
    assert circles(internal(files)) == []
    assert doubled(files) == []
    assert hidden_imports(files) == []


def test_an_import_upwards_is_found(tmp_path: Path):
    files = tree(tmp_path, **SOUND, erase_sd__common__cli="def f():\n    from erase_sd.core import trim\n")
    assert forbidden(files) == ["erase_sd.common.cli must not import erase_sd.core.trim"]


def test_a_circle_of_types_is_found(tmp_path: Path):
    one = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from erase_sd.core.two import B\n"
    files = tree(tmp_path, erase_sd__core__one=one, erase_sd__core__two="from erase_sd.core.one import A\n")
    assert circles(internal(files)) == ["erase_sd.core.one -> erase_sd.core.two -> erase_sd.core.one"]


def test_a_file_for_one_reader_is_found(tmp_path: Path):
    files = tree(tmp_path, **SOUND, erase_sd__run__loop="", erase_sd__train="from erase_sd.core import trim\n")
    assert lonely(files) == [
        "erase_sd.common.files has 1 importers: make it part of its importer",
        "erase_sd.core.trim has 1 importers: make it part of its importer",
    ]


def test_a_word_with_two_meanings_is_found(tmp_path: Path):
    files = tree(tmp_path, erase_sd__core__task="class Part: pass\n", eval__images__folder="Part = tuple\n")
    assert doubled(files) == ["Part means 2 things: erase_sd.core.task, eval.images.folder"]


def test_a_hidden_import_is_found(tmp_path: Path):
    text = "def f():\n    import torch\n    import diffusers\n"
    files = tree(tmp_path, erase_sd__core__task=text)
    assert hidden_imports(files) == ["erase_sd.core.task, f: import torch at the top of the module"]


def test_density_counts_every_comprehension(tmp_path: Path):
    files = tree(tmp_path, eval__report="\n".join(["x = [y for y in (z for z in range(3))]"] * 10) + "\n")
    assert density(files, "eval") == 200.0
