"""Judges that say which of several things a picture shows: one interface, whatever looks.

pocket              the embedded model's oracle
clip:ID_OR_FOLDER   CLIP zero-shot: the nearest of the things, and of sentences that name none, in held-out sentences
imagenette:FILE     a TorchScript classifier of ImageNet's 1000 classes, such as ResNet-50: the first of them all

    judge = naming("clip:openai/clip-vit-large-patch14", ("cat", "dog", "horse"), 32)
    judge.named([image, ...])       # ["dog", None, ...]: None is nothing of these
    showing(judge, "cat")           # the judge of one thing, for attacks
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest
from erase_sd.common.imaging import broken
from erase_sd.pocket import oracle
from erase_sd.pocket.world import part_named
from eval.features.extractors import load as load_extractor
from eval.images.folder import Entry, ImageFolder, picture
from eval.judges.oracle import rate

JUDGES = "pocket, clip:ID_OR_FOLDER or imagenette:FILE"
HELD_OUT = (  # no sentence that any concept is trained under, see prompts/templates.py
    "a snapshot that shows {}",
    "{} can be seen here",
    "this picture is about {}",
    "a rendering with {} in it",
)
NOTHING = ("something", "a scene", "a pattern", "nothing in particular")  # for pictures that show none of the things
IMAGENETTE = {  # names and places among ImageNet's 1000 classes
    "tench": 0,
    "english springer": 217,
    "cassette player": 482,
    "chain saw": 491,
    "church": 497,
    "french horn": 566,
    "garbage truck": 569,
    "gas pump": 571,
    "golf ball": 574,
    "parachute": 701,
}
SIDE, MEAN, STD = (256, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's ResNets
Shows = Callable[[list[Image.Image]], list[bool]]


@dataclass(frozen=True, kw_only=True)
class NamingJudge:
    """Who names pictures; `key` is a hash of all that its answers depend on."""

    name: str
    key: str
    named: Callable[[list[Image.Image]], list[str | None]]  # one of the things for every picture, None for none


def naming(judge: str, things: Sequence[str], batch_size: int) -> NamingJudge:
    """Return the judge of this name, which tells `things` apart.

    Raises UserError for an unknown judge, for what cannot be loaded, and for things that a judge does not know.
    """
    kind, _, source = judge.partition(":")
    if judge == "pocket":
        return _pocket(things)
    if kind == "clip" and source:
        return _clip(judge, things, batch_size)
    if kind == "imagenette" and source:
        return _imagenette(judge, source, things, batch_size)
    raise UserError(f"--judge {judge} is none of {JUDGES}")


def showing(judge: NamingJudge, thing: str) -> Shows:
    """Return who says whether pictures show one thing; a broken picture shows none and is not asked about."""

    def shows(images: list[Image.Image]) -> list[bool]:
        return [answer == thing for answer in judge.named(images)]

    return whole_only(shows)


def whole_only(shows: Shows) -> Shows:
    """Ask only about pictures that are some: all others show nothing."""

    def answer(images: list[Image.Image]) -> list[bool]:
        sound = [i for i, image in enumerate(images) if not broken(image)]
        answers = [False] * len(images)
        if sound:
            for i, shown in zip(sound, shows([images[i] for i in sound]), strict=True):
                answers[i] = shown
        return answers

    return answer


def _pocket(things: Sequence[str]) -> NamingJudge:
    """Return the oracle; things of several kinds are answered by the kind of the first."""
    parts = [part_named(text) for text in things]
    kind, _ = parts[0]
    if any(other != kind for other, _ in parts):
        raise UserError(f"--judge pocket names one kind at a time, and {', '.join(things)} are several: give one kind")
    known = {word: text for (_, word), text in zip(parts, things, strict=True)}
    network = oracle.load()

    def named(images: list[Image.Image]) -> list[str | None]:
        return [known.get(answer[kind]) for answer in oracle.name(network, images)]

    key = digest(["naming", "pocket", file_digest(oracle.WEIGHTS), list(things)])
    return NamingJudge(name=f"pocket oracle, {kind}", key=key, named=named)


def _clip(judge: str, things: Sequence[str], batch_size: int) -> NamingJudge:
    """Zero-shot: a class for every thing, of held-out sentences, and one for each sentence that names none."""
    extractor = load_extractor(judge)
    classes = []
    with torch.no_grad():
        for thing in things:
            classes.append(class_vector(extractor.texts([sentence.format(thing) for sentence in HELD_OUT])))
        for nothing in NOTHING:
            classes.append(class_vector(extractor.texts([sentence.format(nothing) for sentence in HELD_OUT])))
    table = torch.stack(classes)
    answers = [*things, *[None] * len(NOTHING)]

    @torch.no_grad()
    def named(images: list[Image.Image]) -> list[str | None]:
        found = []
        for start in range(0, len(images), batch_size):
            batch = [extractor.prepare(image.convert("RGB")) for image in images[start : start + batch_size]]
            features = extractor.images(torch.stack(batch)).float()
            nearest = (features @ table.to(features.device).T).argmax(1)
            found += [answers[i] for i in nearest.tolist()]
        return found

    return NamingJudge(name=judge, key=digest(["naming", extractor.key, list(things), HELD_OUT, NOTHING]), named=named)


def class_vector(features: Tensor) -> Tensor:
    """Return the direction (D,) of sentences (n, D): the mean of their unit vectors, as CLIP ensembles prompts."""
    mean = torch.nn.functional.normalize(features.float(), dim=1).mean(0)
    return mean / mean.norm()


def _imagenette(judge: str, source: str, things: Sequence[str], batch_size: int) -> NamingJudge:
    """Return a classifier of ImageNet: a picture shows a thing if no other of the 1000 classes is likelier."""
    unknown = [thing for thing in things if thing.casefold() not in IMAGENETTE]
    if unknown:
        raise UserError(f"--judge imagenette knows no {unknown[0]!r}: it names {', '.join(IMAGENETTE)}")
    if not Path(source).is_file():
        raise UserError(f"--judge {judge}: there is no file {source}: give a TorchScript ResNet-50 of ImageNet")
    try:
        network = torch.jit.load(source, map_location="cpu").eval()
        logits = network(torch.zeros(1, 3, SIDE[1], SIDE[1]))
    except RuntimeError as error:
        reason = shorten(str(error).strip().splitlines()[-1], 160, placeholder=" ...")
        text = f"--judge {judge} cannot be run ({reason})"
        raise UserError(f"{text}: give a TorchScript ResNet-50 of ImageNet") from error
    if logits.shape != (1, 1000):
        raise UserError(f"--judge {judge} answers {tuple(logits.shape)}, not 1000 classes: give one of ImageNet")
    known = {IMAGENETTE[thing.casefold()]: thing for thing in things}

    @torch.no_grad()
    def named(images: list[Image.Image]) -> list[str | None]:
        found = []
        for start in range(0, len(images), batch_size):
            batch = torch.stack([_standardised(image) for image in images[start : start + batch_size]])
            found += [known.get(i) for i in network(batch).argmax(1).tolist()]
        return found

    return NamingJudge(name=judge, key=digest(["naming", file_digest(source), list(things)]), named=named)


def _standardised(image: Image.Image) -> Tensor:
    """Return (3, 224, 224): the shorter side to 256 pixels, cut from the middle, as ImageNet's ResNets are tested."""
    resized, cut = SIDE
    short = min(image.size)
    wide, high = (round(resized * side / short) for side in image.size)
    image = image.convert("RGB").resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - cut) // 2, (high - cut) // 2
    x = torch.from_numpy(np.array(image.crop((left, top, left + cut, top + cut)))).movedim(-1, 0).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def named_in(folder: ImageFolder, judge: NamingJudge, batch_size: int) -> tuple[list[Entry], list[str | None]]:
    """Return every image of a folder with what is broken, and what it shows; a broken one shows nothing."""
    entries: list[Entry] = []
    answers: list[str | None] = []
    for start in range(0, len(folder.entries), batch_size):
        sound = []
        batch = []
        for entry in folder.entries[start : start + batch_size]:
            image, reason = picture(folder, entry)
            batch.append(replace(entry, broken=reason))
            if not reason:
                sound.append(image)
        found = iter(judge.named(sound) if sound else [])
        for entry in batch:
            answers.append(None if entry.broken else next(found))
        entries += batch
    return entries, answers


def asked(prompt: str | None, things: Sequence[str]) -> str | None:
    """Return the first of the things that a prompt names as whole words, None if it names none."""
    for thing in things:
        if prompt is not None and re.search(rf"\b{re.escape(thing)}s?\b", prompt, re.IGNORECASE):
            return thing
    return None


def kept_and_gone(entries: Sequence[Entry], answers: Sequence[str | None], things: Sequence[str]) -> dict[str, Any]:
    """Return {"UA", "IRA"} of the first thing, which was erased, and the others: a share with Wilson's interval each.

    UA is the share of its prompts whose pictures do not show it, IRA the accuracy on the others' prompts. A broken
    picture counts against both; prompts that name none of the things count in neither.
    """
    gone, kept = [], []
    for entry, answer in zip(entries, answers, strict=True):
        wanted = asked(entry.prompt, things)
        if wanted == things[0]:
            gone.append([not entry.broken and answer != wanted])
        elif wanted is not None:
            kept.append([not entry.broken and answer == wanted])
    return {"UA": rate(gone), "IRA": rate(kept)}
