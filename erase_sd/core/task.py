"""What the algorithm asks of a model: batches, losses, a backward pass. Nothing here knows what the model does."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
"""One tensor per parameter name: weights, gradients, scores. Never concatenated."""


class MicroBatch(NamedTuple):
    """A micro-batch: what is computed at once. A batch's loss is the sum of share * loss(part) over its parts."""

    batch: Any
    share: float = 1.0
    last: bool = True  # of its batch


class Shards(Protocol):
    """How the parameters are divided among the ranks: each along its first dimension, in the order of the ranks.

    Whoever counts over all entries, or depends on their order, asks these two; the rest of the core is local.
    """

    def total(self, x: Tensor) -> Tensor:
        """Sum over the shards of something counted on each of them, alike on every rank; `x` itself without shards."""

    def before(self, x: Tensor) -> Tensor:
        """Sum over the lower ranks' shards of something counted on each of them; zeros without shards."""

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors named and shaped like parameters, or <parameter>/<slot>, as a checkpoint holds them: undivided."""

    def mine(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """This rank's part of what `whole` returned."""


class Replicated:
    """Every rank holds the parameters whole."""

    def total(self, x: Tensor) -> Tensor:
        """Already whole."""
        return x

    def before(self, x: Tensor) -> Tensor:
        """Nothing comes first."""
        return torch.zeros_like(x)

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Themselves."""
        return tensors

    def mine(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All of them."""
        return tensors


REPLICATED = Replicated()


class Task(Shards, Protocol):
    """A model, its data and its losses. Every loss is a scalar tensor, the mean over the samples of this rank's slice.

    (seed, purpose, step) determines the global batch and a rank only slices it, so that resuming needs no data state.
    """

    model: nn.Module
    seed: int

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters theta that repair moves, by name, in a fixed order."""

    def trimmable(self) -> dict[str, nn.Parameter]:
        """The parameters that may be re-initialised, by name, in a fixed order; normalisation layers never are."""

    def ranked(self) -> dict[str, nn.Parameter]:
        """The parameters among which the top k is taken: the trimmable ones, or more (the released code ranks all)."""

    def batch(self, purpose: str, step: int) -> Any:
        """Batch number `step` of one purpose ("repair", "sensitivity", ...): forget and retain samples together."""

    def micro_batches(self, batch: Any) -> Iterable[MicroBatch]:
        """The micro-batches of a batch, as many on every rank; the ranks' gradients may meet at the last one only.

        Each part's forward and backward pass come before the next part is asked for.
        """

    def forget(self, batch: Any) -> Tensor:
        """L_f on the forget samples: the lower, the better the model remembers them."""

    def retain(self, batch: Any) -> Tensor:
        """L_r on the retain samples."""

    def preserve(self, batch: Any) -> Tensor:
        """Distance of the retain samples' answers from the original model's: zero before any change."""

    def redirect(self, batch: Any) -> Tensor:
        """Distance of the forget samples' behaviour from its replacement: another label, an anchor prompt."""

    def contrast(self, batch: Any) -> Tensor:
        """Forget loss minus the same inputs' loss under the replacement: only what is specific to the concept."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to every `.grad`: fp32 whatever the autocast, averaged over the ranks."""

    def mean(self, x: Tensor) -> Tensor:
        """Mean of losses over the ranks' slices of a batch; `x` itself in a single process."""


class DiffusionTask(Task, Protocol):
    """A task whose model predicts noise, velocity or flow; latents are (n, channels, height, width).

    A caption's conditioning is a dict of tensors with n rows, named as the model's own arguments.
    """

    samples: Any  # all captions and pictures that batches are drawn from

    def predict(self, x_t: Tensor, t: Tensor, cond: Params) -> Tensor:
        """The model's output, shaped like x_t, for timesteps t (n,) and conditioning of n rows."""

    def predict_original(self, x_t: Tensor, t: Tensor, cond: Params) -> Tensor:
        """What the model before any change returns, without a gradient."""

    def empty_cond(self, n: int) -> Params:
        """The conditioning of n empty captions."""

    def concept_cond(self, n: int) -> Params:
        """The conditioning of the concept's own words, n times."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t from clean latents and noise of one shape, at timesteps t (n,)."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should return at x_t: noise, velocity or flow, as the scheduler says."""


def gradient(task: Task, loss: Callable[[Any], Tensor], batch: Any, params: dict[str, nn.Parameter]) -> Params:
    """Gradient of `loss(batch)` with respect to `params`, accumulated over the parts of the batch; see `taken`."""
    for part in task.micro_batches(batch):
        task.backward(part.share * loss(part.batch))
    return taken(task, params)


def taken(task: Task, params: dict[str, nn.Parameter]) -> Params:
    """The gradients that backward passes left, in fp32 or wider; zeros where no loss depended on a parameter.

    The `.grad` tensors are handed over, not copied, and no parameter of the model keeps one.
    Raises FloatingPointError naming the first parameter whose gradient holds NaN or infinity.
    """
    g = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}
    clear(task)
    g = {name: x.detach().to(torch.promote_types(x.dtype, torch.float32)) for name, x in g.items()}
    if name := first_lost(task, g):
        raise FloatingPointError(f"the gradient of {name} holds NaN or infinity")
    return g


def first_lost(shards: Shards, tensors: Params) -> str | None:
    """The first tensor that holds NaN or infinity, alike on every rank, whosever it is; None if all are finite."""
    finite = torch.stack([_finite(x) for x in tensors.values()]).long()
    missing = shards.total(finite - 1).tolist()  # one transfer, not one per tensor
    return next((name for name, n in zip(tensors, missing, strict=True) if n < 0), None)


def _finite(x: Tensor) -> Tensor:
    """Whether every entry is finite, in one pass and without the temporaries of `isfinite`: the extremes tell."""
    return (
        torch.stack(x.aminmax()).isfinite().all() if x.numel() else torch.ones((), dtype=torch.bool, device=x.device)
    )


def clear(task: Task) -> None:
    """No parameter of the model keeps a gradient."""
    for p in task.model.parameters():
        p.grad = None
