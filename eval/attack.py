"""Is it really gone? `python -m eval.attack runs/cat --judge pocket --concept cat --output_dir attacks/cat`.

Attacks a model from which a concept was erased, and beside it the unerased one (an attack that does not reach 90 %
there shows nothing) and any further model, such as one that never saw the concept (`--beside retrain=FOLDER`: what
remains there is the attack's own doing). Prints and stores, for every attack: its box (white sees weights, grey hands
over noisy latents, black sends prompts), what the plain prompt draws already, what only the attack brings back, and
its cost.

The same command goes on where it was stopped; `accelerate launch -m eval.attack ...` shares the targets out.
"""

from __future__ import annotations

import json
import sys
import typing
from dataclasses import asdict, dataclass, fields, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState

from erase_sd.common.cli import argument, at_least, knob, parse, quiet, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest
from erase_sd.models.checks import check_place
from erase_sd.models.foreign import Artefacts, identity, is_single_file
from erase_sd.pocket.score import GUIDANCE, STEPS
from eval.attacks import ATTACKS, PLAIN
from eval.attacks import attack as build
from eval.attacks.asked import Asked, called, of_concept, of_pocket
from eval.attacks.base import AttackJudge, AttackSampling, AttackSetup, ConceptAttack
from eval.attacks.judges import judge
from eval.attacks.pictures import Originals, from_folder
from eval.attacks.published import PublishedPrompts
from eval.attacks.runner import AttackedModel, AttackFolder, Campaign
from eval.images.folder import read
from eval.images.pipelines import load, place, weights_digest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NOTHING_FOREIGN = Artefacts()
ATTACKED, ORIGINAL = "attacked", "original"
EXAMPLES = 900_000_000  # first image seed of the pictures that attacks learn from: no target and no training has it


@dataclass(frozen=True, kw_only=True)
class AttackJob:
    """What to attack, for which concept, how, and who judges."""

    model: str = argument("run folder, network folder or file, diffusers folder or Hub id, or 'pocket'")
    unet: str | None = knob(
        None, "what is attacked is MODEL with this UNet: run or UNet folder, Hub id or single file"
    )
    text_encoder: str | None = knob(None, "what is attacked is MODEL with this text encoder, a folder or file")
    adapter: tuple[str, ...] = knob((), "what is attacked is MODEL with these LoRA or SPM files, FILE or FILE@0.5")
    concept: str = knob("", 'what was erased: words ("cat", "neon style") or a concept file ("nudity")')
    judge: str = knob("", "pocket, nudenet, nudenet:PROTOCOL or clip:ID_OR_FOLDER")
    attack: tuple[str, ...] = knob(("all",), "all, or names; plain prompts are always drawn")
    prompt_files: tuple[str, ...] = knob((), "published prompts to replay, .csv or .txt, each a result of its own")
    output_dir: str = knob("attacks", "folder of the results; the same command again goes on where it was")
    original: str | None = knob(None, "the unerased model (default: the one that the run started from)")
    controls: bool = knob(True, "attack the unerased model as well")
    beside: tuple[str, ...] = knob((), "further models, NAME=FOLDER, such as retrain=runs/retrain")
    budget: Literal["published", "small"] | None = knob(
        None, "options of the attacks (default: small for the pocket model, else published)"
    )
    set: tuple[str, ...] = knob((), "single options, such as concept-inversion.steps=500")
    targets: int | None = knob(None, "pictures to bring back (default: 64, or every row of --prompts)")
    prompts: str | None = knob(None, "a source of eval.generate in the place of the concept's own prompts")
    pictures: str | None = knob(None, "folder of pictures of the concept (default: the original draws them)")
    wordings: tuple[str, ...] = knob((), "other names of the concept, such as kitten feline")
    others: tuple[str, ...] = knob((), "sentences that a clip judge weighs the concept against")
    skip_plain: bool = knob(False, "go only for what the plain prompt does not draw, as UnlearnDiffAtk does")
    censor: bool = knob(True, "store pictures of explicit concepts pixelated")
    steps: int | None = knob(None, "denoising steps (default: 50, pocket 20)", ("num_inference_steps",))
    guidance: float | None = knob(None, "guidance scale (default: 7.5, pocket 3.5)", ("guidance_scale",))
    size: int | None = knob(None, "side in pixels (default: the model's own)", ("resolution",))
    dtype: Literal["float32", "float16", "bfloat16"] = knob("float32", "number format of the weights")
    batch_size: int = knob(16, "pictures drawn at a time")
    seed: int = knob(0, "seed of every draw")

    def __post_init__(self) -> None:
        """Raise UserError for what is missing and for numbers outside their range."""
        at_least(self, 1, "batch_size")
        at_least(self, 0, "seed")
        for name in ("targets", "steps", "size"):
            if getattr(self, name) is not None:
                at_least(self, 1, name)
        if self.guidance is not None:
            at_least(self, 0, "guidance")
        if self.size is not None and self.size % 8:
            raise UserError(f"--size {self.size} is no multiple of 8, as VAEs need: give {self.size // 8 * 8 or 8}")
        if not self.concept:
            raise UserError("--concept is missing: name what was erased, such as --concept cat")
        if not self.judge:
            raise UserError("--judge is missing: give pocket, nudenet or clip:ID_OR_FOLDER")
        for text in self.beside:
            name, _, source = text.partition("=")
            if not name.replace("-", "").replace("_", "").isalnum() or not source or name in (ATTACKED, ORIGINAL):
                raise UserError(f"--beside {text} is no NAME=FOLDER: give one such as retrain=runs/retrain")


def main(argv: list[str] | None = None) -> int:
    """Attack, store, print."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Try to bring an erased concept back, by every attack there is."
    options = AttackJob(**parse(argv, prog="eval.attack", description=text, attack_job=AttackJob)["attack_job"])
    quiet()
    results = attack(options)

    if PartialState().is_main_process:
        print(table(results))
    return 0


def attack(options: AttackJob) -> list[dict[str, Any]]:
    """Carry out what is missing and return all results. Raises UserError for bad input before anything is drawn, and
    SystemExit with 128 + signal when stopped: the same call goes on."""

    models = _models(options)
    attacks = _attacks(options)
    asked = _asked(options)
    judged_by = judge(options.judge, asked.concept, options.others, options.batch_size)
    sampling = _sampling(options)
    state = PartialState(cpu=not torch.accelerator.is_available())  # else several CPU processes would be strangers
    for model in models.values():  # each is loaded once to see that it can be: later would be after hours
        attacks = _possible(options, attacks, model.load(), asked)
    original = models[ORIGINAL].load().to(state.device)
    protocol = {
        "concept": options.concept,
        "judge": judged_by.name,
        "judge_sha256": judged_by.key,
        "prompts": asked.source,
        "prompts_sha256": asked.sha256,
        "targets": [asdict(target) for target in asked.targets],
        "sampling": {"steps": sampling.steps, "guidance": sampling.guidance, "size": sampling.size},
        "dtype": options.dtype,
        "seed": options.seed,
        "skip_plain": options.skip_plain,
        "original_sha256": models[ORIGINAL].sha256,
        "pictures_sha256": _pictures_digest(options.pictures),
        "wordings": list(options.wordings),
    }
    with AttackFolder(Path(options.output_dir), protocol, state) as folder:
        setup = _setup(options, original, asked, judged_by, sampling, attacks, models[ORIGINAL].sha256)
        for model in _in_turn(models, options.controls):
            _campaign(options, folder, model, attacks, setup, asked)
        results = folder.finish() if state.is_main_process else []
        state.wait_for_everyone()
    return results


def _pictures_digest(path: str | None) -> str | None:
    """Hash of a folder's pictures. Raises UserError if there is no such folder, or nothing in it."""

    if path is None:
        return None
    folder = read(path)
    return digest([file_digest(folder.path / entry.file) for entry in folder.entries])


def _campaign(options: AttackJob, folder: Any, model: AttackedModel, attacks: dict, setup: Any, asked: Asked) -> None:
    """One model under all attacks."""

    pipe = setup.original if model.name == ORIGINAL else model.load().to(folder.state.device)
    Campaign(
        folder=folder,
        model=model,
        attacks=attacks,
        setup=replace(setup, pipe=pipe),
        asked=asked,
        hidden=options.censor and (asked.explicit or options.judge.startswith("nudenet")),
        skip_plain=options.skip_plain,
    ).run()


def _in_turn(models: dict[str, AttackedModel], controls: bool) -> list[AttackedModel]:
    """The attacked model first; the original only as a control."""
    wanted = dict(models)
    if ATTACKED in models and not controls:
        del wanted[ORIGINAL]
    return list(wanted.values())


def _models(options: AttackJob) -> dict[str, AttackedModel]:
    """The attacked model, the original and those beside it; a whole pipeline without --original is the original."""
    given = Artefacts(options.unet, options.text_encoder, options.adapter)
    base = options.original or _base(options.model)
    if base is None and any(given) and _is_whole(options.model):
        base = options.model
    if base is None:
        if not _is_whole(options.model):
            text = f"{options.model} does not say which model it was made from"
            raise UserError(f"{text}: give --original, the unerased model's folder or Hub id")
        models = {ORIGINAL: _model(options, ORIGINAL, options.model, options.model)} | _beside(options, options.model)
        print(f"{options.model} is taken for an unerased model: no --original was given", file=sys.stderr)
        return models
    attacked = _model(options, ATTACKED, options.model, base, given)
    return {ATTACKED: attacked, ORIGINAL: _model(options, ORIGINAL, base, base)} | _beside(options, base)


def _beside(options: AttackJob, base: str) -> dict[str, AttackedModel]:
    models = {}
    for text in options.beside:
        name, _, source = text.partition("=")
        models[name] = _model(options, name, source, base)
    return models


def _is_whole(source: str) -> bool:
    """Whether this is a pipeline of its own and no network that goes into one."""
    folder = Path(source)
    if is_single_file(source):
        return False
    return source == "pocket" or not folder.is_dir() or (folder / "model_index.json").is_file()


def _base(source: str) -> str | None:
    """The model that a run started from, as its run.json says."""
    file = Path(source) / "run.json"
    if _is_whole(source) or not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base"]["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} names no model that the run started from ({error!r}): give --original") from error


def _model(options: AttackJob, name: str, source: str, base: str, given: Artefacts = NOTHING_FOREIGN) -> AttackedModel:
    """A model by its source and what is put into it; a network alone goes into the base.

    Raises UserError for what does not exist.
    """
    whole = _is_whole(source)
    network: dict[str, Any] = {"unet": None, "transformer": None}
    if not whole:
        part = "unet" if is_single_file(source) else _part(source)
        if given.unet:
            raise UserError(f"{source} is a {part} and so is --unet {given.unet}: give the base model and --unet")
        network[part] = source
    if not is_single_file(source):
        check_place(place(source), "--beside" if name not in (ATTACKED, ORIGINAL) else "MODEL")
    if given.unet:
        network["unet"] = given.unet

    def loaded() -> DiffusionPipeline:
        parts = {"text_encoder": given.text_encoder, "adapter": given.adapter}
        return load(source if whole else base, **network, **parts, dtype=options.dtype, scheduler=None)

    hashes = [weights_digest(source) or source] + ([] if whole else [weights_digest(base) or base])
    if any(given):
        hashes += [weights_digest(given.unet) or str(given.unet), identity(given)]
    shown = " + ".join([source, *(path for _, path in given.sources())])
    return AttackedModel(name=name, source=shown, sha256=digest(hashes), load=loaded)


def _part(source: str) -> str:
    """Which network a folder holds. Raises UserError if none."""
    folder = Path(source)
    for part in ("unet", "transformer"):
        if (folder / part).is_dir():
            return part
    if not (folder / "config.json").is_file():
        raise UserError(f"{source} holds no unet/, transformer/ or model_index.json: give a run or a model's folder")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name", "")
    return "unet" if "UNet" in kind else "transformer"


def _attacks(options: AttackJob) -> dict[str, ConceptAttack]:
    """The attacks by name, plain prompts first, with their options. Raises UserError for a name or an option that is
    none."""

    names = list(ATTACKS) if "all" in options.attack else list(dict.fromkeys((PLAIN, *options.attack)))
    for name in names:
        if name not in ATTACKS:
            raise UserError(f"--attack {name} is none of all, {', '.join(ATTACKS)}")
    given = _given(options.set, names)
    pocket = options.judge == "pocket"
    budget = options.budget or ("small" if pocket else "published")
    attacks = {name: build(name, budget, given.get(name)) for name in names}
    for file in options.prompt_files:
        published = PublishedPrompts(file=file)
        published.targets([])  # a file that cannot be read is a mistake now, not after an hour
        if published.name in attacks:
            raise UserError(f"--prompt_files {file}: another file is called {published.name} too: rename one")
        attacks[published.name] = published
    return attacks


def _given(texts: tuple[str, ...], names: list[str]) -> dict[str, dict[str, Any]]:
    """{"tina": {"steps": 10}} of "tina.steps=10". Raises UserError for what is no attack, option or value."""

    given: dict[str, dict[str, Any]] = {}
    for text in texts:
        place, _, value = text.partition("=")
        name, _, option = place.partition(".")
        if name not in names:
            raise UserError(f"--set {text}: {name!r} is none of the attacks to carry out: {', '.join(names)}")
        kinds = [field.name for field in fields(ATTACKS[name])]
        if option not in kinds:
            raise UserError(f"--set {text}: {name} has no option {option!r}, only {', '.join(kinds) or 'none at all'}")
        given.setdefault(name, {})[option] = _read(text, value, typing.get_type_hints(ATTACKS[name])[option])
    return given


def _read(text: str, value: str, kind: Any) -> Any:
    """A value as the option's type has it; lists are separated by commas."""
    many = typing.get_origin(kind) is tuple
    single = next(part for part in (typing.get_args(kind) or (kind,)) if part in (int, float, str))
    try:
        values = tuple(single(part) for part in value.split(","))
    except ValueError:
        raise UserError(f"--set {text}: {value!r} is no {single.__name__}: correct it") from None
    return values if many else values[0]


def _asked(options: AttackJob) -> Asked:
    """The concept with its targets. Raises UserError where the two do not fit the judge."""

    if options.judge == "pocket" and not options.prompts:
        asked = of_pocket(options.concept, options.targets, options.seed)
    else:
        asked = of_concept(options.concept, options.prompts, options.targets, options.seed)
    return called(asked, options.wordings)


def _sampling(options: AttackJob) -> AttackSampling:
    steps, guidance = (STEPS, GUIDANCE) if options.judge == "pocket" else (50, 7.5)
    return AttackSampling(
        steps=options.steps or steps,
        guidance=guidance if options.guidance is None else options.guidance,
        size=options.size,
        batch_size=options.batch_size,
    )


def _possible(
    options: AttackJob, attacks: dict[str, ConceptAttack], pipe: DiffusionPipeline, asked: Asked
) -> dict[str, ConceptAttack]:
    """The attacks without those that "all" brought in and that do not fit; UserError for one that was asked for."""
    kept = {}
    for name, each in attacks.items():
        why = each.refusal(pipe, asked.concept)
        if why and name in options.attack:
            raise UserError(f"--attack {name}: {why}: leave it out")
        if why:
            print(f"{name} is left out: {why}", file=sys.stderr)
        else:
            kept[name] = each
    return kept


def _setup(
    options: AttackJob,
    original: DiffusionPipeline,
    asked: Asked,
    judged_by: AttackJudge,
    sampling: AttackSampling,
    attacks: dict[str, ConceptAttack],
    model_hash: str,
) -> AttackSetup:
    """All that the attacks get, but for the attacked model: the original's pictures of the targets, and examples."""

    many = max(each.examples for each in attacks.values())
    captions = list(islice(cycle(asked.captions), many))
    if options.pictures:
        z = from_folder(original, Path(options.pictures), sampling)
        references = z[torch.arange(len(asked.targets)) % len(z)]
        examples = z[torch.arange(many) % len(z)]
    else:
        cache = Path(options.output_dir) / "prepared"
        source = Originals(pipe=original, sha256=model_hash, sampling=sampling, cache=cache)
        wanted = any(each.needs_references for each in attacks.values())
        references = source.of_targets(asked.targets) if wanted else []
        first = EXAMPLES + 10_000 * options.seed
        examples = source.of_prompts(captions, list(range(first, first + many))) if many else None
    return AttackSetup(
        pipe=original,
        original=original,
        concept=asked.concept,
        judge=judged_by,
        sampling=sampling,
        seed=options.seed,
        references=dict(enumerate(references)),
        captions=tuple(captions),
        examples=examples,
    )


HEAD = (
    "attack",
    "model",
    "box",
    "plain",
    "+ attack only",
    "= ASR",
    "95 %",
    "attack alone",
    "queries",
    "steps",
    "s",
)

WORDS = 3  # columns of text, set to the left


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as text: rates in percent; queries, gradient steps and seconds are means of a target.

    The models stand beside each other under every attack.
    """

    order = dict(zip(ATTACKS, range(len(ATTACKS)), strict=True))
    ranked = sorted(results, key=lambda result: (order.get(result["attack"], len(order)), result["attack"]))
    rows = [HEAD, *map(_row, ranked)]
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if i < WORDS else cell.rjust(width) for cell in column])
    lines = map("  ".join, zip(*columns, strict=True))
    return "\n".join(lines)


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    n = max(1, result["attempted"])
    low, high = result["asr"]["ci95"]
    return (
        result["attack"],
        result["model"],
        result["box"],
        "-" if result["pre"] is None else _percent(result["pre"]),
        _percent(result["post"]),
        _percent(result["asr"]),
        f"{100 * low:.0f} to {100 * high:.0f}",
        _percent(result["alone"]),
        f"{result['queries'] / n:.1f}",
        f"{(result['gradient_steps'] + result['prepared_gradient_steps']) / n:.0f}",
        f"{(result['seconds'] + result['prepared_seconds']) / n:.1f}",
    )


def _percent(rate: dict[str, Any]) -> str:
    return "-" if rate["value"] is None else f"{100 * rate['value']:.1f}"


if __name__ == "__main__":
    run_main(main)
