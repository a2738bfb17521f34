"""What the algorithm asks of a model: batches, losses, a backward pass. Nothing here knows what the model does."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from erase_sd.common.memory import fitting

Params = dict[str, Tensor]
"""One tensor per parameter name: weights, gradients, scores. Never concatenated."""

Loss = Callable[[Any], Tensor | Iterable[Tensor]]
"""A function of a micro-batch: a scalar, or terms that add up to it and are differentiated one by one (`terms`)."""


class MicroBatch(NamedTuple):
    """What is computed at once. A batch's loss is the sum of share * loss(micro-batch) over its micro-batches."""

    batch: Any
    share: float = 1.0
    last: bool = True  # of its batch


class Shards(Protocol):
    """How the parameters are divided among the ranks: each along its first dimension, in the order of the ranks.

    Whoever counts over all entries, or depends on their order, asks `all_reduce` or `exclusive_scan`; whoever writes a
    checkpoint or reads one, `gather` or `local`; the rest of the core sees this rank's entries only.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the shards of what was counted on each, alike on every rank; x itself without shards."""

    def exclusive_scan(self, x: Tensor) -> Tensor:
        """Return the sum over the lower ranks' shards of what was counted on each; zeros without shards."""

    def gather(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return undivided tensors of those named <parameter> or <parameter>/<slot>, as a checkpoint holds them."""

    def local(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return this rank's part of what `gather` returned."""


class Replicated:
    """Shards of parameters that every rank holds in full."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return x: every rank already counted over the full tensors."""
        return x

    def exclusive_scan(self, x: Tensor) -> Tensor:
        """Return zeros: no entry lies on a lower rank."""
        return torch.zeros_like(x)

    def gather(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors: they are undivided."""
        return tensors

    def local(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors: all of each belongs to every rank."""
        return tensors


REPLICATED = Replicated()


class Task(Protocol):
    """A model, its data and its losses. Every loss is a scalar tensor, the mean over the samples of this rank's slice.

    (seed, purpose, step) determines the global batch and a rank only slices it, so that resuming needs no data state.
    """

    model: nn.Module
    seed: int
    shards: Shards

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters theta that repair moves, by name, in a fixed order."""

    def trimmable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that may be re-initialised, by name, in a fixed order; norms never are."""

    def ranked(self) -> dict[str, nn.Parameter]:
        """Return the parameters among which the top k is taken: the trimmable ones, or more, as the released code."""

    def batch(self, purpose: str, step: int) -> Any:
        """Return batch `step` of one purpose ("repair", "sensitivity", ...): forget and retain samples together."""

    def micro_batches(self, batch: Any) -> Iterable[MicroBatch]:
        """Yield the micro-batches of a batch, as many on every rank; gradients are averaged at the last one only.

        The forward and backward pass of each come before the next is asked for.
        """

    def forget(self, batch: Any) -> Tensor:
        """Return L_f on the forget samples: the lower, the better the model remembers them."""

    def retain(self, batch: Any) -> Tensor:
        """Return L_r on the retain samples."""

    def preserve(self, batch: Any) -> Tensor:
        """Return the distance of the predictions on the retain samples from the original model's: zero at first."""

    def redirect(self, batch: Any) -> Tensor:
        """Return the distance of the forget samples' behaviour from a replacement: another label, an anchor prompt."""

    def contrast(self, batch: Any) -> Tensor | Iterable[Tensor]:
        """Return L_f minus the same inputs' loss under the replacement: only what is specific to the concept."""

    def smaller(self) -> bool:
        """Compute less at a time from the next micro-batch on, and return True; False where that cannot be."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to every `.grad`: fp32 whatever the autocast, averaged over the ranks."""

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of losses over the ranks' slices of a batch; x itself in a single process."""


class DiffusionTask(Task, Protocol):
    """A task whose model predicts noise, velocity or flow; latents are (n, channels, height, width).

    A caption's conditioning is a dict of tensors with n rows, named as the model's own arguments.
    """

    samples: Any  # all captions and latents that batches are drawn from

    def predict(self, x_t: Tensor, t: Tensor, cond: Params) -> Tensor:
        """Return the model's output, shaped like x_t, for timesteps t (n,) and conditioning of n rows."""

    def predict_original(self, x_t: Tensor, t: Tensor, cond: Params) -> Tensor:
        """Return what the original model predicts, without a gradient."""

    def empty_cond(self, n: int) -> Params:
        """Return the conditioning of n empty captions."""

    def concept_cond(self) -> Params:
        """Return the conditioning of the concepts' own words: a row for each concept."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t of clean latents and noise of one shape, at timesteps t (n,)."""

    def guided(self, batch: Any) -> Tensor:
        """Return L_f of the answers under classifier-free guidance: the released codes measure saliency by it."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what `predict` should return at x_t: noise, velocity or flow, as the scheduler says."""


def terms(loss: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield what adds up to a loss: itself, or its terms, each computed after the one before was differentiated.

    So only one term's graph is alive at a time.
    """
    if isinstance(loss, Tensor):
        yield loss
    else:
        yield from loss


def gradient(task: Task, loss: Loss, batch: Any, params: dict[str, nn.Parameter]) -> Params:
    """Return the gradient of `loss(batch)` by `params`, accumulated over the micro-batches; see `taken`."""

    def work() -> Params:
        for part in task.micro_batches(batch):
            for term in terms(loss(part.batch)):
                task.backward(part.share * term)
        return taken(task, params)

    return fitted(task, work)


def fitted(task: Task, work: Callable[[], Any]) -> Any:
    """Return what is computed from a batch, from its start again in smaller micro-batches when memory runs out."""

    def smaller() -> bool:
        clear(task)  # what the failed try has added up
        return task.smaller()

    return fitting(work, smaller)


def taken(task: Task, params: dict[str, nn.Parameter]) -> Params:
    """Return the gradients that backward passes left, in fp32 or wider; zeros where no loss depended on a parameter.

    The `.grad` tensors are handed over, not copied, and no parameter of the model keeps one.
    Raises FloatingPointError naming the first parameter whose gradient holds NaN or infinity.
    """
    g: Params = {}
    for name, p in params.items():
        g[name] = torch.zeros_like(p) if p.grad is None else p.grad
    clear(task)
    for name, x in g.items():
        g[name] = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if name := first_lost(g, task.shards):
        raise FloatingPointError(f"the gradient of {name} holds NaN or infinity")
    return g


def kept(g: Params, theta: dict[str, nn.Parameter]) -> Params:
    """Return a gradient that waits for another one in the weights' own precision: of bf16 weights, half as large."""
    narrow: Params = {}
    for name in list(g):
        narrow[name] = g.pop(name).to(theta[name].dtype)
    return narrow


def first_lost(tensors: Params, shards: Shards = REPLICATED) -> str | None:
    """Return the first tensor with NaN or infinity, alike on every rank, whosever it is; None if all are finite."""
    finite = torch.stack([_finite(x) for x in tensors.values()]).long()
    missing = shards.all_reduce(finite - 1).tolist()  # one transfer, not one per tensor
    for name, n in zip(tensors, missing, strict=True):
        if n < 0:
            return name
    return None


def _finite(x: Tensor) -> Tensor:
    """Return whether every entry is finite, in one pass and without temporaries of its size: the extremes tell."""
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    return torch.stack(x.aminmax()).isfinite().all()


def clear(task: Task) -> None:
    """Leave no gradient in any parameter of the model."""
    for p in task.model.parameters():
        p.grad = None
