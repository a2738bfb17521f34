"""A classifier as a Task of the core: cross-entropy on the forget set, on the retain set, and towards other labels.

    forget    l(f(x_f), y_f)                     Scissorhands' L_f
    retain    l(f(x_r), y_r)                     Scissorhands' L_r
    preserve  KL(f_0(x_r) || f(x_r))             the retain set answered as before
    redirect  l(f(x_f), y')                      another label y'
    contrast  l(f(x_f), y_f) - l(f(x_f), y')

l is the mean cross-entropy, f_0 the network before any change.
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
        knobs: ClassifierSettings,
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.dataset, self.shards = model.to(accelerator.device), dataset, REPLICATED
        self.walks = {
            "forget": EpochSampler(forget, dataset, "forget", seed),
            "retain": EpochSampler(retain, dataset, "retain", seed),
        }
        self.knobs, self.seed, self.accelerator = knobs, seed, accelerator
        self._original: nn.Module | None = None
        self.samples = {"forward": 0, "backward passes": 0}  # work done, whatever the machine
        self._before = copy.deepcopy(self.model.state_dict())
        model.requires_grad_(True).train(knobs.batch_norm == "train")
        self._trainable = self._scope(knobs.train_scope, "train_scope")
        norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}
        scoped = self._scope(knobs.trim_scope, "trim_scope")
        self._trimmable = {name: p for name, p in scoped.items() if id(p) not in norms}
        self._ranked = self._scope(knobs.rank_scope, "rank_scope") if knobs.rank_scope else self._trimmable

    def _scope(self, pattern: str, option: str) -> dict[str, nn.Parameter]:
        try:
            found = {name: p for name, p in self.model.named_parameters() if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"--{option} {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise UserError(f"--{option} {pattern!r} matches no parameter, such as {next(iter(self._before))}")
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, in the model's order."""
        return self._trainable

    def trimmable(self) -> dict[str, nn.Parameter]:
        """Parameters that may be re-initialised, norms excluded, in the model's order."""
        return self._trimmable

    def ranked(self) -> dict[str, nn.Parameter]:
        """Parameters among which the most sensitive are looked for, in the model's order."""
        return self._ranked

    def batch(self, purpose: str, step: int) -> ClassifierBatch:
        """The global batch of this step, sliced to this rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = step * self.knobs.batch_size
        positions = torch.arange(first + rank, first + self.knobs.batch_size, ranks)
        return ClassifierBatch(lambda name: self._placed(self.walks[name].samples(purpose, positions)))

    def micro_batches(self, batch: ClassifierBatch) -> tuple[MicroBatch, ...]:
        """One: batch norm sees the whole of this rank's slice."""
        return (MicroBatch(batch),)

    def epoch(self, name: str) -> int:
        """Steps in which the forget or the retain set is walked through once."""
        return -(-len(self.walks[name].images) // self.knobs.batch_size)

    def clean(self, name: str, rows: Tensor) -> LabelledSamples:
        """Examples of a set as they are, by row: for methods that look at each of them."""
        return self._placed(self.walks[name].clean(rows))

    def _placed(self, samples: LabelledSamples) -> LabelledSamples:
        return LabelledSamples(*(part.to(self.accelerator.device) for part in samples))

    def logits(self, x: Tensor) -> Tensor:
        """The network's answers (n, K) in fp32, under accelerate's autocast."""
        self.samples["forward"] += len(x)
        with self.accelerator.autocast():
            return self.model(x).float()

    def forget(self, batch: ClassifierBatch) -> Tensor:
        """L_f."""
        return F.cross_entropy(self.logits(batch.forget.x), batch.forget.y)

    def retain(self, batch: ClassifierBatch) -> Tensor:
        """L_r."""
        return F.cross_entropy(self.logits(batch.retain.x), batch.retain.y)

    def preserve(self, batch: ClassifierBatch) -> Tensor:
        """How far the answers to the retain samples are from the original network's, in nats."""
        with torch.no_grad():
            wanted = self.original()(batch.retain.x).log_softmax(1)
        return F.kl_div(self.logits(batch.retain.x).log_softmax(1), wanted, log_target=True, reduction="batchmean")

    def redirect(self, batch: ClassifierBatch) -> Tensor:
        """Cross-entropy of the forget samples towards the other label."""
        return F.cross_entropy(self.logits(batch.forget.x), self._target(batch))

    def contrast(self, batch: ClassifierBatch) -> Tensor:
        """L_f less the loss towards the other label."""
        logits = self.logits(batch.forget.x)
        return F.cross_entropy(logits, batch.forget.y) - F.cross_entropy(logits, self._target(batch))

    def _target(self, batch: ClassifierBatch) -> Tensor:
        if self.knobs.relabel == "random":
            return batch.forget.other
        with torch.no_grad():
            answers = self.original()(batch.forget.x)
        return answers.scatter(1, batch.forget.y[:, None], -torch.inf).argmax(1)

    def original(self) -> nn.Module:
        """The network before any change, in evaluation mode; made when it is first asked for."""
        if self._original is None:
            self._original = copy.deepcopy(self.model).eval().requires_grad_(False)
            self._original.load_state_dict(self._before)
        return self._original

    def backward(self, loss: Tensor) -> None:
        """Gradients in fp32, averaged over the ranks."""
        self.samples["backward passes"] += 1
        self.accelerator.backward(loss)
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad = self.accelerator.reduce(p.grad / scale if scale != 1 else p.grad, "mean")

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a scalar over the ranks."""
        return self.accelerator.reduce(x, "mean")


DRAWS = 4  # uniform numbers per sample of an epoch: one for its other label, three for its augmentation


class LabelledSamples(NamedTuple):
    """This rank's slice of one set: pixels (n, C, H, W) in [0, 1], labels (n,), other labels (n,) for redirect."""

    x: Tensor
    y: Tensor
    other: Tensor


class ClassifierBatch:
    """Forget and retain samples of one step, drawn when they are first asked for: many methods need only one set."""

    def __init__(self, draw: Callable[[str], LabelledSamples]) -> None:
        self._draw = draw

    @cached_property
    def forget(self) -> LabelledSamples:
        """Samples of the forget set."""
        return self._draw("forget")

    @cached_property
    def retain(self) -> LabelledSamples:
        """Samples of the retain set."""
        return self._draw("retain")


class EpochSampler:
    """One set and its order for every purpose."""

    def __init__(self, images: Images, dataset: Dataset, name: str, seed: int) -> None:
        self.images, self.dataset = images, dataset
        self.augment, self.classes = dataset.augment, len(dataset.classes)
        self.name, self.seed = name, seed
        self._epochs: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def samples(self, purpose: str, positions: Tensor) -> LabelledSamples:
        """The augmented samples at these positions (n,) of the walk."""
        n = len(self.images)
        rows, u = torch.empty_like(positions), torch.empty(len(positions), DRAWS)
        for epoch in (positions // n).unique().tolist():
            order, draws = self._epoch(purpose, epoch)
            here = positions // n == epoch
            rows[here], u[here] = order[positions[here] % n], draws[positions[here] % n]
        pixels = augment(self.images.pixels[rows], self.augment, u[:, 1:])
        return self._with_others(to_float(pixels), self.images.labels[rows], 1 + (u[:, 0] * (self.classes - 1)).long())

    def part(self, share: float) -> EpochSampler:
        """A walk through a share of the set, in (0, 1], drawn once: at least one example, and itself for 1."""
        if share == 1:
            return self
        n = len(self.images)
        rows = torch.randperm(n, generator=generator(self.seed, "part", self.name))[: max(1, round(share * n))]
        return EpochSampler(self.images.take(rows), self.dataset, self.name, self.seed)

    def clean(self, rows: Tensor) -> LabelledSamples:
        """Examples by row (n,), as they are; the other label is the next one."""
        images = self.images.take(rows)
        return self._with_others(to_float(images.pixels), images.labels, torch.ones(len(rows)).long())

    def _with_others(self, x: Tensor, y: Tensor, shift: Tensor) -> LabelledSamples:
        """Beside each label the one `shift` classes further, which is never the true one."""
        return LabelledSamples(x, y, (y + shift) % self.classes)

    def _epoch(self, purpose: str, epoch: int) -> tuple[Tensor, Tensor]:
        """Order (n,) and uniform draws (n, DRAWS) of one epoch; those of the last two are kept."""
        key = (purpose, epoch)
        if key not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k[0] != purpose or k[1] == epoch - 1}
            g, n = generator(self.seed, "walk", self.name, purpose, epoch), len(self.images)
            self._epochs[key] = torch.randperm(n, generator=g), torch.rand(n, DRAWS, generator=g)
        return self._epochs[key]
