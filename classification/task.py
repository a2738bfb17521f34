"""A classifier as a Task of the core: cross-entropy on the forget set, on the retain set, and towards other labels.

    forget    l(f(x_f), y_f)                     Scissorhands' L_f
    retain    l(f(x_r), y_r)                     Scissorhands' L_r
    preserve  KL(f_0(x_r) || f(x_r))             the retain set classified as before
    redirect  l(f(x_f), y')                      another label y'
    contrast  l(f(x_f), y_f) - l(f(x_f), y')

l is the mean cross-entropy, f_0 the original model, before any change.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from classification.data.dataset import Dataset, Images
from classification.data.transforms import augment, to_float
from classification.settings import ClassifierSettings
from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.core.task import REPLICATED, MicroBatch

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


class ClassificationTask:
    """See `erase_sd.core.task`. Sample i of step k is a function of (seed, purpose, k, i), whoever draws it."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        forget: Images,
        retain: Images,
        settings: ClassifierSettings,
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.model = model.to(accelerator.device)
        self.dataset = dataset
        self.shards = REPLICATED
        any_label = settings.relabel == "any"
        self.walks = {
            "forget": EpochSampler(forget, dataset, "forget", seed, any_label=any_label),
            "retain": EpochSampler(retain, dataset, "retain", seed, any_label=any_label),
        }
        self.settings = settings
        self.seed = seed
        self.accelerator = accelerator
        self.unseen: Images | None = None  # examples that the original model was not trained on, for who compares
        self._original: nn.Module | None = None
        self.samples = {"forward": 0, "backward passes": 0}  # work done, whatever the machine
        self._before = copy.deepcopy(self.model.state_dict())
        model.requires_grad_(True).train(settings.batch_norm == "train")
        self._trainable = self._scope(settings.train_scope, "train_scope")
        norms = set()
        for layer in model.modules():
            if isinstance(layer, NORMS):
                norms.update(map(id, layer.parameters()))
        scoped = self._scope(settings.trim_scope, "trim_scope")
        self._trimmable = {name: p for name, p in scoped.items() if id(p) not in norms}
        self._ranked = self._trimmable
        if settings.rank_scope:
            self._ranked = self._scope(settings.rank_scope, "rank_scope")

    def _scope(self, pattern: str, option: str) -> dict[str, nn.Parameter]:
        """Return the parameters whose name matches; UserError for no expression, and where none matches."""
        try:
            found = {name: p for name, p in self.model.named_parameters() if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"--{option} {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise UserError(f"--{option} {pattern!r} matches no parameter, such as {next(iter(self._before))}")
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, in the model's order."""
        return self._trainable

    def trimmable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that may be re-initialised, norms excluded, in the model's order."""
        return self._trimmable

    def ranked(self) -> dict[str, nn.Parameter]:
        """Return the parameters among which the most sensitive are looked for, in the model's order."""
        return self._ranked

    def batch(self, purpose: str, step: int) -> ClassifierBatch:
        """Return the global batch of this step, sliced to this rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = step * self.settings.batch_size
        positions = torch.arange(first + rank, first + self.settings.batch_size, ranks)

        def samples_of(name: str) -> LabelledSamples:
            return self._placed(self.walks[name].samples(purpose, positions))

        return ClassifierBatch(samples_of)

    def join(self, share: float = 1.0) -> None:
        """Make the walk through both sets mixed, of the retain set a share: it holds its own copy of the pixels."""
        forget, retain = self.walks["forget"].images, self.walks["retain"].part(share).images
        both = Images(
            pixels=torch.cat([forget.pixels, retain.pixels]),
            labels=torch.cat([forget.labels, retain.labels]),
            ids=forget.ids + retain.ids,
        )
        any_label = self.settings.relabel == "any"
        self.walks["joint"] = EpochSampler(
            both, self.dataset, "joint", self.seed, any_label=any_label, redirected=len(forget)
        )

    def micro_batches(self, batch: ClassifierBatch) -> tuple[MicroBatch, ...]:
        """Return one micro-batch: batch norm sees the whole of this rank's slice."""
        return (MicroBatch(batch),)

    def pass_batch(self, purpose: str, epoch: int, position: int) -> ClassifierBatch:
        """Return a batch of one pass through each set: it ends with the set, so that its last batch may be smaller.

        `batch` goes on with the next epoch instead; released loops pass. Every rank has as many samples: where they
        do not divide, the pass's first ones are repeated, as torch's DistributedSampler does.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = position * self.settings.batch_size

        def samples_of(name: str) -> LabelledSamples:
            n = len(self.walks[name].images)
            count = min(self.settings.batch_size, n - first)
            positions = torch.arange(first + rank, first + -(-count // ranks) * ranks, ranks) % n
            return self._placed(self.walks[name].samples(purpose, epoch * n + positions))

        return ClassifierBatch(samples_of)

    def epoch(self, name: str, share: float = 1.0) -> int:
        """Return the number of steps in which a set is walked through once.

        `name` is "forget", "retain", "turns" for one after the other or "joint" for both mixed, of the retain set a
        share in (0, 1].
        """
        if name == "turns":
            return self.epoch("forget") + self.epoch("retain")
        n = len(self.walks["forget" if name == "joint" else name].images)
        if name == "joint":
            n += part_size(len(self.walks["retain"].images), share)
        return -(-n // self.settings.batch_size)

    def clean(self, name: str, rows: Tensor) -> LabelledSamples:
        """Return examples of a set without augmentation, by row (n,): for methods that look at each of them."""
        return self._placed(self.walks[name].clean(rows))

    def _placed(self, samples: LabelledSamples) -> LabelledSamples:
        device = self.accelerator.device
        return LabelledSamples(samples.x.to(device), samples.y.to(device), samples.other.to(device))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (n, K) of images x (n, C, H, W) in fp32, under accelerate's autocast."""
        self.samples["forward"] += len(x)
        with self.accelerator.autocast():
            return self.model(x).float()

    def forget(self, batch: ClassifierBatch) -> Tensor:
        """Return L_f, the cross-entropy of the forget samples."""
        return F.cross_entropy(self.logits(batch.forget.x), batch.forget.y)

    def retain(self, batch: ClassifierBatch) -> Tensor:
        """Return L_r, the cross-entropy of the retain samples."""
        return F.cross_entropy(self.logits(batch.retain.x), batch.retain.y)

    def preserve(self, batch: ClassifierBatch) -> Tensor:
        """Return the KL divergence of the retain samples' answers from the original model's, in nats."""
        with torch.no_grad():
            wanted = self._original_logits(batch.retain.x).log_softmax(1)
        return F.kl_div(self.logits(batch.retain.x).log_softmax(1), wanted, log_target=True, reduction="batchmean")

    def redirect(self, batch: ClassifierBatch) -> Tensor:
        """Return the cross-entropy of the forget samples towards the other label."""
        return F.cross_entropy(self.logits(batch.forget.x), self._target(batch))

    def mixed(self, batch: ClassifierBatch) -> Tensor:
        """Return the cross-entropy of a batch of both sets mixed: to the other label for those of the forget set."""
        return F.cross_entropy(self.logits(batch.joint.x), batch.joint.other)

    def contrast(self, batch: ClassifierBatch) -> Tensor:
        """Return L_f less the loss towards the other label."""
        logits = self.logits(batch.forget.x)
        return F.cross_entropy(logits, batch.forget.y) - F.cross_entropy(logits, self._target(batch))

    def guided(self, batch: ClassifierBatch) -> Tensor:
        """Raise UserError: only diffusion models answer under guidance."""
        raise UserError(
            "--mask_mode released measures under guidance, which classifiers have not: give hard or gradient"
        )

    def _target(self, batch: ClassifierBatch) -> Tensor:
        """Return the other labels (n,) of the forget samples: drawn ones, or the original model's runner-up."""
        if self.settings.relabel != "nearest":
            return batch.forget.other
        with torch.no_grad():
            logits = self._original_logits(batch.forget.x)
        return logits.scatter(1, batch.forget.y[:, None], -torch.inf).argmax(1)

    def _original_logits(self, x: Tensor) -> Tensor:
        """Return the original network's logits (n, K), computed as `logits` are."""
        with self.accelerator.autocast():
            return self.original()(x).float()

    def original(self) -> nn.Module:
        """Return the network before any change, in evaluation mode; it is made at the first call."""
        if self._original is None:
            self._original = copy.deepcopy(self.model).eval().requires_grad_(False)
            self._original.load_state_dict(self._before)
        return self._original

    def smaller(self) -> bool:
        """Return False: batch norm sees the whole of this rank's slice at once."""
        return False

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to every `.grad`, in fp32 and averaged over the ranks."""
        self.samples["backward passes"] += 1
        self.accelerator.backward(loss)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad = self.accelerator.reduce(p.grad, "mean")

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of a scalar over the ranks."""
        return self.accelerator.reduce(x, "mean")


DRAWS = 4  # uniform numbers per sample of an epoch: one for its other label, three for its augmentation


def part_size(n: int, share: float) -> int:
    """Return how many of n examples a share in (0, 1] of them is: one at least."""
    return max(1, round(share * n))


class LabelledSamples(NamedTuple):
    """This rank's slice of one set: pixels (n, C, H, W) in [0, 1], labels (n,), other labels (n,) for redirect."""

    x: Tensor
    y: Tensor
    other: Tensor


class ClassifierBatch:
    """Forget and retain samples of one step, taken at the first access: many methods need only one set."""

    def __init__(self, samples_of: Callable[[str], LabelledSamples]) -> None:
        self._samples_of = samples_of

    @cached_property
    def forget(self) -> LabelledSamples:
        """Return the samples of the forget set."""
        return self._samples_of("forget")

    @cached_property
    def retain(self) -> LabelledSamples:
        """Return the samples of the retain set."""
        return self._samples_of("retain")

    @cached_property
    def joint(self) -> LabelledSamples:
        """Return samples of both sets mixed."""
        return self._samples_of("joint")


class EpochSampler:
    """One set, and the order in which every purpose walks through it, epoch by epoch."""

    def __init__(
        self,
        images: Images,
        dataset: Dataset,
        name: str,
        seed: int,
        *,
        any_label: bool = False,
        redirected: int | None = None,
    ) -> None:
        """Of the first `redirected` images the other label is drawn, of the rest it is the true one (None: of all).

        It is any but the true one; with `any_label` it is any, the true one too.
        """
        self.images, self.dataset = images, dataset
        self.augment = dataset.augment
        self.classes = len(dataset.classes)
        self.name = name
        self.seed = seed
        self.least = 0 if any_label else 1  # classes between the true label and the other one
        self.redirected = len(images) if redirected is None else redirected
        self._epochs: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def samples(self, purpose: str, positions: Tensor) -> LabelledSamples:
        """Return the augmented samples at these positions (n,) of the walk."""
        n = len(self.images)
        rows = torch.empty_like(positions)
        u = torch.empty(len(positions), DRAWS)
        for epoch in (positions // n).unique().tolist():
            order, draws = self._epoch(purpose, epoch)
            here = positions // n == epoch
            rows[here] = order[positions[here] % n]
            u[here] = draws[positions[here] % n]
        pixels = augment(self.images.pixels[rows], self.augment, u[:, 1:])
        shift = self.least + (u[:, 0] * (self.classes - self.least)).long()
        shift[rows >= self.redirected] = 0
        return self._with_others(to_float(pixels), self.images.labels[rows], shift)

    def part(self, share: float) -> EpochSampler:
        """Return a walk through a share of the set, in (0, 1], drawn once: at least one example, and itself for 1."""
        if share == 1:
            return self
        n = len(self.images)
        rows = torch.randperm(n, generator=generator(self.seed, "part", self.name))[: part_size(n, share)]
        return EpochSampler(self.images.take(rows), self.dataset, self.name, self.seed, any_label=self.least == 0)

    def clean(self, rows: Tensor) -> LabelledSamples:
        """Return examples by row (n,), without augmentation; the other label is the next one."""
        images = self.images.take(rows)
        return self._with_others(to_float(images.pixels), images.labels, torch.ones(len(rows)).long())

    def _with_others(self, x: Tensor, y: Tensor, shift: Tensor) -> LabelledSamples:
        """Return the samples with, beside each label, the one `shift` classes further: the true one for 0."""
        return LabelledSamples(x, y, (y + shift) % self.classes)

    def _epoch(self, purpose: str, epoch: int) -> tuple[Tensor, Tensor]:
        """Return order (n,) and uniform draws (n, DRAWS) of one epoch; those of the last two are kept."""
        key = (purpose, epoch)
        if key not in self._epochs:
            for other in list(self._epochs):
                if other[0] == purpose and other[1] != epoch - 1:
                    del self._epochs[other]
            g = generator(self.seed, "walk", self.name, purpose, epoch)
            order = torch.randperm(len(self.images), generator=g)
            draws = torch.rand(len(self.images), DRAWS, generator=g)
            self._epochs[key] = order, draws
        return self._epochs[key]
