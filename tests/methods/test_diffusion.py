"""What is special to methods that learn from the network itself: ESD's target, UCE's equations, CA's pictures."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.denoising.samples import Samples, check_captions, subjects
from erase_sd.denoising.task import DenoisingTask
from erase_sd.methods.concept_ablation import ConceptAblation
from erase_sd.methods.esd import ESD
from erase_sd.methods.uce import UCE
from erase_sd.models.parameters import select
from erase_sd.plan import make
from erase_sd.settings import TaskSettings
from prompts import Example
from tests.conftest import byte_tokenizer

N, L, D = 4, 77, 32
HIDDEN = "encoder_hidden_states"


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made_up() -> Samples:
    """Two captions with their anchors, four retain captions, latents that no model drew."""
    rng = generator(0, "made up")
    return Samples(
        forget=torch.randn(N, 4, 8, 8, generator=rng),
        retain=torch.randn(N, 4, 8, 8, generator=rng),
        caption=torch.tensor([0, 1, 0, 1]),
        anchor=torch.tensor([2, 3, 2, 3]),
        keep=torch.tensor([4, 5, 6, 4]),
        embeddings={HIDDEN: torch.randn(8, L, D, generator=rng)},
        empty=7,
        concepts=(6,),
        anchors=torch.randn(N, 4, 8, 8, generator=rng),
        subject=torch.tensor([[3, 3], [5, 4], [3, 3], [5, 4]]),
    )


def task(pipe: StableDiffusionPipeline, **changes: object) -> DenoisingTask:
    knobs = replace(TaskSettings(batch_size=3, drop_captions=0.0), **changes)
    return DenoisingTask(pipe, made_up(), knobs, 0, Accelerator(cpu=True))


def disturb(pipe: StableDiffusionPipeline) -> None:
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator(0, "disturb", name))


@pytest.mark.parametrize("direction", ["words", "caption"])
@pytest.mark.parametrize(("start", "eta"), [("concept", 2.0), ("nothing", 1.0), ("anchor", 0.5)])
def test_esd_fits_its_target_by_the_original_network(
    tiny_pipe: StableDiffusionPipeline, start: str, eta: float, direction: str
) -> None:
    ours, unet = task(tiny_pipe), tiny_pipe.unet
    b = ours.batch("repair", 0)
    x_t = ours.add_noise(b.z_f, b.noise_f, b.t_f)
    words, empty = ({HIDDEN: made_up().embeddings[HIDDEN][[row] * 3]} for row in (6, 7))
    with torch.no_grad():
        c, a, nothing, w = (unet(x_t, b.t_f, **cond).sample for cond in (b.c_f, b.c_a, empty, words))
        disturb(tiny_pipe)  # the target must not follow
        e = unet(x_t, b.t_f, **b.c_f).sample
    towards = {"words": w, "caption": c}[direction] - nothing
    target = {"concept": c, "nothing": nothing, "anchor": a}[start] - eta * towards
    loss = ESD(start=start, eta=eta, direction=direction).objective(ours, b, 0)
    torch.testing.assert_close(loss.detach(), F.mse_loss(e, target), rtol=1e-4, atol=1e-6)
    assert loss.requires_grad


def test_esd_goes_against_each_samples_own_concept(tiny_pipe: StableDiffusionPipeline) -> None:
    ours = task(tiny_pipe)
    ours.samples = ours.samples._replace(words=torch.tensor([0, 1, 0, 1]), concepts=(0, 1))
    b = ours.batch("repair", 0)
    loss = ESD().objective(ours, b, 0)
    assert torch.equal(b.c_w[HIDDEN], b.c_f[HIDDEN])  # here each caption is its concept
    torch.testing.assert_close(loss, ESD(direction="caption").objective(ours, b, 0))


def test_esds_two_notations_are_one_target(tiny_pipe: StableDiffusionPipeline) -> None:
    ours = task(tiny_pipe)
    b = ours.batch("repair", 0)
    new, old = (
        ESD(start=s, eta=eta, direction="caption").objective(ours, b, 0)
        for s, eta in (("concept", 2.0), ("nothing", 1.0))
    )
    torch.testing.assert_close(new, old)


def test_concept_ablation_looks_at_the_anchors_pictures(tiny_pipe: StableDiffusionPipeline) -> None:
    ours, unet = task(tiny_pipe, anchor_model="current"), tiny_pipe.unet
    b = ours.batch("repair", 0)
    x_t = ours.add_noise(b.z_a, b.noise_f, b.t_f)
    with torch.no_grad():
        e, wanted = (unet(x_t, b.t_f, **c).sample for c in (b.c_f, b.c_a))
    model = ConceptAblation().objective(ours, b, 0)
    noise = ConceptAblation(target="noise").objective(ours, b, 0)
    both = ConceptAblation(prior=2.0).objective(ours, b, 0)
    for losses, by_hand in (
        (model, F.mse_loss(e, wanted)),
        (noise, F.mse_loss(e, b.noise_f)),
        (both, F.mse_loss(e, wanted) + 2 * F.mse_loss(wanted, b.noise_f)),
    ):
        torch.testing.assert_close(sum(losses).detach(), by_hand, rtol=1e-4, atol=1e-6)


def least_squares(W: Tensor, samples: Samples, method: UCE) -> Tensor:
    """W' of UCE's three sums as one stacked least-squares problem over rows [inputs | wanted answers]."""
    inputs, wanted = [], []

    def add(x: Tensor, y: Tensor, weight: float) -> None:
        inputs.append(x.double() * weight**0.5)
        wanted.append(y.double() @ W.T * weight**0.5)

    E, last = samples.embeddings[HIDDEN], slice(None) if method.tokens == "all" else slice(1)
    add(E[0, 3:][last], E[2, 3:][last], method.erase_scale / 2)
    add(E[1, 5:][last], E[3, 4:76][last], method.erase_scale / 2)  # ends where the farther index ends
    for row in (4, 5, 6, 7):
        add(E[row], E[row], method.preserve_scale / 4)
    add(torch.eye(D), torch.eye(D), method.lam)
    return torch.linalg.lstsq(torch.cat(inputs), torch.cat(wanted)).solution.T


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_uce_solves_its_least_squares_problem(tiny_pipe: StableDiffusionPipeline, tokens: str) -> None:
    ours, method = (
        task(tiny_pipe, train_scope="xattn"),
        UCE(tokens=tokens, erase_scale=3.0, preserve_scale=0.4, lam=0.7),
    )
    before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    ((record, state),) = method(ours)
    edited = 0
    for name, p in ours.model.named_parameters():
        if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight")):
            exact = least_squares(before[name].double(), made_up(), method)
            torch.testing.assert_close(p.detach().double(), exact, rtol=1e-5, atol=1e-6)
            edited += 1
        else:
            assert torch.equal(p, before[name]), name
    assert edited == 32
    assert record["moved"] > 0.01
    assert not list(method(ours, state))


def test_uce_with_nothing_to_preserve_gives_the_concept_the_anchors_answers(
    tiny_pipe: StableDiffusionPipeline,
) -> None:
    ours, E = task(tiny_pipe, train_scope="kv"), made_up().embeddings[HIDDEN]
    W, p = next((p.detach().clone(), p) for p in ours.trainable().values())
    list(UCE(tokens="last", preserve_scale=0.0, lam=1e-6)(ours))
    for c, g in ((E[0, 3], E[2, 3]), (E[1, 5], E[3, 4])):
        torch.testing.assert_close(p @ c, W @ g, rtol=1e-3, atol=1e-4)


def test_uce_needs_cross_attention(tiny_pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(UserError, match="--train_scope"):
        UCE().check_network(tiny_pipe.unet, select(tiny_pipe.unet, "selfattn"))
    with pytest.raises(UserError, match="--lam 0 leaves"):
        UCE(lam=0.0)
    with pytest.raises(UserError, match="--erase_scale -1"):
        UCE(erase_scale=-1.0)


def test_what_a_method_needs_is_asked_for_at_once() -> None:
    with pytest.raises(UserError, match="esd learns from the original network: give --anchor_model original"):
        make(concept="cat", method="esd", anchor_model="current")
    with pytest.raises(UserError, match="give --anchor_pictures"):
        make(concept="cat", method="concept-ablation", anchor_pictures=False)


@pytest.mark.parametrize(
    ("caption", "anchor", "at"),
    [
        ("a cat", "a dog", (4, 4)),  # one token per letter: <s> a c a t </s>
        ("a cat here", "a person here", (4, 7)),
        ("a tree in neon style", "a tree", (16, 5)),  # nothing replaces it: the last word that the anchor keeps
        ("neon", "", (4, 0)),
    ],
)
def test_the_place_where_the_concept_ends(caption: str, anchor: str, at: tuple[int, int]) -> None:
    assert subjects(byte_tokenizer(), [caption], [anchor]).tolist() == [list(at)]


def test_a_caption_without_a_concept() -> None:
    with pytest.raises(UserError, match="'a dog' says no more than its anchor 'a dog'"):
        check_captions(byte_tokenizer(), [Example("a dog", "a dog", "a dog")])
    assert subjects(byte_tokenizer(), ["a dog"], ["a dog"]) is None
