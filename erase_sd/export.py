"""A finished run in the format that a tool loads, and the way back: `python -m erase_sd.export RUN --to pipeline`.

Nothing is written before everything is known to fit, and a file that is written is whole.

    python -m erase_sd.export runs/cat --to single-file --output cat-erased.safetensors
    python -m erase_sd.export runs/cat --to delta --output cat.delta.safetensors
    python -m erase_sd.export --apply cat.delta.safetensors --model BASE --output erased
    python -m erase_sd.export --restore cat.delta.safetensors --model erased --output base
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from erase_sd.common.cli import argument, knob, parse, quiet, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, slug
from erase_sd.exports import FORMATS
from erase_sd.exports.base import Erased, ExportSettings, Format
from erase_sd.exports.delta import apply_delta, read_delta, restore_delta
from erase_sd.models import guidance
from erase_sd.models.checks import check_weights
from erase_sd.models.families import family, modules, network
from erase_sd.models.pipeline import load, load_network, save_network
from erase_sd.pocket import FOLDER, score
from erase_sd.pocket import prompt_sets as lessons
from erase_sd.pocket import world as captions
from erase_sd.run.record import weights_hash

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

PARTS = ("unet", "transformer")


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """What to export, or which delta to apply or undo."""

    run: tuple[str, ...] = argument("folder of a finished run, or with --model any folder with a network", ())
    to: Literal["pipeline", "single-file", "delta", "lora", "pt", "hub"] | None = knob(None, "the format")
    output: str | None = knob(None, "folder or file to write; it must not be there yet")
    model: str | None = knob(None, "the base: folder, Hub id, .safetensors file or 'pocket' (default: the run's own)")
    model_config: str | None = knob(None, "how a single-file base is laid out: folder or Hub id")
    any_base: bool = knob(False, "go on although the base is not the one whose hash the run holds")
    measure: bool = knob(True, "lora on the pocket model: score the pictures of every rank, as the run did")
    apply: str | None = knob(None, "a delta: write the erased network that it makes of --model")
    restore: str | None = knob(None, "a delta: write the base's network that --model was before")


def main(argv: list[str] | None = None) -> int:
    """Carry out what the arguments ask for and print how to use it; returns the exit code."""
    given = parse(
        sys.argv[1:] if argv is None else argv,
        prog="python -m erase_sd.export",
        description=f"Write an erased model as other tools load it. Formats: {', '.join(FORMATS)}.",
        job=ExportJob,
        files=ExportSettings,
    )
    job, settings = ExportJob(**given["job"]), ExportSettings(**given["files"])
    lines = change(job) if job.apply or job.restore else export(job, settings)
    print("\n".join(lines))
    return 0


def export(job: ExportJob, settings: ExportSettings) -> list[str]:
    """Write a run in a format; returns what was written and how to load it. Raises UserError before writing."""
    if len(job.run) != 1:
        raise UserError(f"{len(job.run)} runs are given: name the folder of one, such as runs/cat --to pipeline")
    if job.to is None:
        raise UserError(f"the format is missing: give --to and one of {', '.join(FORMATS)}")
    chosen, folder = FORMATS[job.to], Path(job.run[0])
    record = read_record(folder, job.model)
    part = erased_part(folder)
    output = check_output(job.output, chosen.suffixes, job.to) if chosen.local else Path()
    check_format(chosen, job.to, part, settings)
    if chosen.check:
        chosen.check(output, settings)
    if not chosen.guidance and stored_guidance(folder):
        raise UserError(
            f"{folder} keeps guidance beside its network, which --to {job.to} cannot hold: give --to hub, or load it "
            f"with erase_sd.models.pipeline.load(BASE, {part}={str(folder)!r})"
        )
    return chosen.write(loaded(job, folder, record, part), output, settings)


def change(job: ExportJob) -> list[str]:
    """Apply a delta or undo it; returns what was written. Raises UserError before writing, for the wrong model too."""
    if job.apply and job.restore:
        raise UserError("--apply and --restore are opposites: give one of them")
    if job.run or job.to:
        raise UserError("--apply and --restore make a network from --model: leave the run and --to away")
    if job.model is None:
        raise UserError("--model is missing: give the base for --apply, the erased model for --restore")
    output = check_output(job.output, (), "the network of a delta")
    delta = read_delta(job.apply or job.restore)
    quiet()

    network = network_of(job.model, delta.part, job.model_config)
    if job.apply:
        apply_delta(delta, network)
    else:
        restore_delta(delta, network)
    save_network(network, output, delta.part)
    kind, where = type(network).__name__, f'{str(output)!r}, subfolder="{delta.part}"'
    return [f"{output}: {delta.part}/", "", f"pipe.{delta.part} = {kind}.from_pretrained({where})"]


def read_record(folder: Path, model: str | None) -> dict[str, Any]:
    """Return the record of a finished run; for a folder that is no run an empty one, if the base is given.

    Raises UserError for a folder that is missing, unfinished or unreadable.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of a run, such as runs/cat")
    path, status = folder / "run.json", folder / "status.json"
    try:
        if status.is_file() and (state := json.loads(status.read_text(encoding="utf-8"))["state"]) != "complete":
            raise UserError(f"the run in {folder} is {state}, not complete: run its command again to go on")
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds a damaged record ({error}): copy the run again") from error
    if model is None:
        raise UserError(f"{folder} has no run.json: give a finished run, or --model and a network's folder")
    return {}


def erased_part(folder: Path) -> str:
    """Return which network a folder holds, "unet" or "transformer". Raises UserError if it holds none."""
    for part in PARTS:
        if (folder / part).is_dir():
            return part
    config = folder / "config.json"
    if config.is_file():
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name", "")
        return "transformer" if "Transformer" in kind else "unet"
    raise UserError(f"{folder} has no unet/ and no transformer/: give the folder of a run of a diffusers model")


def check_output(output: str | None, suffixes: tuple[str, ...], name: str) -> Path:
    """Return where to write: a file with one of the suffixes, a folder if there are none.

    Raises UserError for a place that is missing, taken or of the wrong kind.
    """
    if output is None:
        raise UserError(f"--output is missing: name the {'file' if suffixes else 'folder'} to write")
    path = Path(output)
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"--output {output}: {name} is one file: give it the suffix {' or '.join(suffixes)}")
    if not suffixes and path.suffix in (".safetensors", ".pt", ".ckpt"):
        raise UserError(f"--output {output}: {name} is a folder: give a name without {path.suffix}")
    taken = path.is_file() or (path.is_dir() and (bool(suffixes) or any(path.iterdir())))
    if taken:
        raise UserError(f"--output {output} is there already: name another place or remove it")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise UserError(f"--output {output}: {there} is a file: name a place in a folder")
    return path


def check_format(chosen: Format, name: str, part: str, settings: ExportSettings) -> None:
    """Raise UserError for a network or a type that the format does not have."""
    if part not in chosen.networks:
        raise UserError(f"--to {name} is for UNets, and this run has a {part}: give --to pipeline, delta, lora or hub")
    for dtype in settings.dtype:
        if dtype not in chosen.dtypes:
            raise UserError(f"--to {name} holds {' or '.join(chosen.dtypes)}, not {dtype}: leave --dtype away")
    if len(settings.dtype) > 1 and not chosen.several_dtypes:
        raise UserError(f"--to {name} holds one type, not {' and '.join(settings.dtype)}: give one --dtype")


def stored_guidance(folder: Path) -> Any:
    """Return the guidance that a run keeps beside its network, None if it keeps none."""

    return guidance.load(str(folder))


def loaded(job: ExportJob, folder: Path, record: dict[str, Any], part: str) -> Erased:
    """Load the base and the erased network, check that they belong together, and return both as one model."""
    quiet()

    config = record.get("config", {})
    model = job.model or config.get("model")
    pipe = load(place(model), config=job.model_config or config.get("model_config"))
    if family(pipe).part != part:
        raise UserError(f"{folder} holds a {part} and {model} a {family(pipe).part}: give the run's own base")
    if record and not job.any_base:
        check_base(pipe, record["base"]["hash"], model)
    network = load_network(str(folder), part, torch.float32)
    check_weights(network, part, str(folder))
    original = getattr(pipe, part)
    check_same_kind(original, network, model, folder)
    concepts = tuple(config.get("concept", [folder.name]))
    erased = Erased(
        pipe=pipe,
        part=part,
        name=slug(" ".join(concepts)),
        original=original if FORMATS[job.to].compares else None,
        guidance=stored_guidance(folder),
        folder=folder,
        base=model,
        concepts=concepts,
        facts=facts(record, model, concepts),
        judge=pocket_judge(pipe, record, folder) if job.to == "lora" and job.measure else None,
    )
    pipe.register_modules(**{part: network})
    return erased


def facts(record: dict[str, Any], model: str, concepts: tuple[str, ...]) -> dict[str, str]:
    """Return what the metadata of an exported file says about its run; no path of this machine."""
    known = {"concept": ", ".join(concepts), "base": Path(model).name if Path(model).exists() else model}
    if record:
        known |= {"method": record["config"]["method"], "preset": str(record["config"]["preset"])}
        known["base_hash"] = record["base"]["hash"]
    return known


def check_base(pipe: DiffusionPipeline, wanted: str, model: str) -> None:
    """Raise UserError unless the base's weights are those that the run started from."""

    found = digest([weights_hash(part) for part in modules(pipe).values()] + guidance.identity(network(pipe)))
    if found != wanted:
        raise UserError(
            f"{model} is not the base of this run: its hash is {found[:12]}, the run's is {wanted[:12]}; give the "
            "right one as --model, or --any_base"
        )


def check_same_kind(original: nn.Module, network: nn.Module, model: str, folder: Path) -> None:
    """Raise UserError unless the two networks have tensors of the same names and shapes."""
    ours = {name: x.shape for name, x in network.state_dict().items()}
    theirs = {name: x.shape for name, x in original.state_dict().items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(f"{folder} and {model} differ in the shape of {name}: give the run's own base as --model")


def network_of(model: str, part: str, config: str | None) -> nn.Module:
    """Return the network of a run, of a network's folder or of a whole model, float32, on the CPU."""

    if Path(model).is_file():
        return getattr(load(model, config=config), part)
    return load_network(place(model), part, torch.float32)


def place(model: str) -> str:
    """Return where a model is: the folder of the pocket model, or the name itself."""

    return str(FOLDER) if model == "pocket" else model


def pocket_judge(base: DiffusionPipeline, record: dict[str, Any], folder: Path) -> Callable | None:
    """Return a function that scores a pipeline as the run was scored, None where there is no judge.

    The base's answers are looked up in the cache beside the run, or drawn once.
    """

    config = record.get("config", {})
    if config.get("model") != "pocket" or not (config["eval_forget"] and config["eval_retain"]):
        return None
    parts = [captions.part_named(text, config["kind"]) for text in config["concept"]]
    questions = lessons.exam(parts, config["eval_forget"], config["eval_retain"], config["seed"])
    cache = folder.parent / ".cache"
    known = cache if cache.is_dir() else None
    before = score.answers(copy.copy(base), questions, record["base"]["hash"], known, "scores of the base")

    def judge(pipe: DiffusionPipeline) -> dict:
        after = score.answers(pipe, questions, "an adapter", None, "scores of the adapter")
        return score.scores(parts, questions, before, after)

    return judge


if __name__ == "__main__":
    run_main(main)
