"""Every method of classification against its formula, written out with autograd, torch.optim and flat vectors."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import quadprog
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.data.dataset import Images
from classification.methods import METHODS, badteacher, lotus
from classification.methods.expanding import Widened
from classification.plan import make
from classification.task import ClassificationTask
from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.core.task import gradient
from erase_sd.run.folder import RunFolder
from erase_sd.run.loop import run

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
STEPS = 7  # more than an epoch of both sets: 2 batches to forget, 3 to retain
MakeTask = Callable[..., ClassificationTask]


def play(method, task: ClassificationTask) -> nn.Module:
    for _ in method(task):
        pass
    return task.model


def sgd(task: ClassificationTask, loss: Callable[[nn.Module, int], Tensor], model: nn.Module | None = None):
    """Plain torch.optim.SGD on loss(model, step)."""
    model = model or task.model
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return model


def forget(task: ClassificationTask, step: int) -> tuple[Tensor, Tensor]:
    x, y, _ = task.batch("repair", step).forget
    return x, y


def retain(task: ClassificationTask, step: int) -> tuple[Tensor, Tensor]:
    x, y, _ = task.batch("repair", step).retain
    return x, y


def same(a: nn.Module, b: nn.Module, atol: float = 1e-6) -> None:
    """Parameters and batch norms' statistics."""
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, x in a.state_dict().items():
        torch.testing.assert_close(x, b.state_dict()[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_retrain_is_sgd_on_the_retain_set_with_the_released_milestones(tiny_task: MakeTask):
    task, plain = tiny_task(), tiny_task()
    method = METHODS["retrain"](steps=STEPS, schedule="multistep", milestones=(0.5, 0.8), **SGD)
    optimizer = torch.optim.SGD(plain.model.parameters(), **SGD)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 6])  # 3.5 and 5.6 steps
    for step in range(STEPS):
        x, y = retain(plain, step)
        optimizer.zero_grad()
        F.cross_entropy(plain.model(x), y).backward()
        optimizer.step()
        schedule.step()
    same(play(method, task), plain.model)


def test_the_weight_of_l1_falls_from_epoch_to_epoch(tiny_task: MakeTask):
    task, plain = tiny_task(), tiny_task()
    gamma = [0.05, 0.05, 0.05, 0.05 * 2 / 3, 0.05 * 2 / 3, 0.05 * 2 / 3, 0.05 / 3]  # 21 images in batches of 8

    def loss(model: nn.Module, step: int) -> Tensor:
        x, y = retain(plain, step)
        return F.cross_entropy(model(x), y) + gamma[step] * sum(p.abs().sum() for p in model.parameters())

    same(play(METHODS["l1-sparse"](steps=STEPS, l1=0.05, **SGD), task), sgd(plain, loss))


def one_pass(task: ClassificationTask, name: str, purpose: str, epoch: int):
    """The batches of 8 of an epoch's order, the rest of it last: what a DataLoader makes of a shuffled set."""
    walk = task.walks[name]
    n = len(walk.images)
    for first in range(0, n, 8):
        yield walk.samples(purpose, torch.arange(epoch * n + first, epoch * n + min(first + 8, n)))


def released_mask(task: ClassificationTask, share: float) -> Tensor:
    """generate_mask.py: evaluation mode, summed gradients of -l of every batch, rank below int(N share)."""
    model = task.model.eval()
    total = 0
    for x, y, _ in one_pass(task, "forget", "sensitivity", 0):
        total = total + flat_gradient(model, -F.cross_entropy(model(x), y))
    rank = total.abs().argsort(descending=True).argsort()
    return rank < int(len(total) * share)


@pytest.mark.parametrize("walk", ["joint", "turns"])
def test_salun_is_the_released_loop(tiny_task: MakeTask, walk: str):
    """RL.py: labels of D_f drawn anew each epoch; one loader over both sets, or a pass over each in turn."""
    settings = {"relabel": "any", "augment": "crop-flip"}
    task, plain = tiny_task(**settings), tiny_task(**settings)
    model, mask = plain.model, released_mask(plain, 0.4)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    taken = []

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        rest = mask
        for p in model.parameters():
            p.grad *= rest[: p.numel()].view(p.shape)
            rest = rest[p.numel() :]
        optimizer.step()
        taken.append(len(x))

    for epoch in range(2):
        if walk == "turns":
            for x, _, drawn in one_pass(plain, "forget", "repair", epoch):
                step(x, drawn)
            for x, y, _ in one_pass(plain, "retain", "repair", epoch):
                step(x, y)
        else:
            plain.join()
            for x, _, wanted in one_pass(plain, "joint", "repair", epoch):
                step(x, wanted)
    assert taken == 2 * ([8, 8, 8, 8, 1] if walk == "joint" else [8, 4, 8, 8, 5])
    assert task.epoch(walk) == 5
    method = METHODS["salun"](steps=10, walk=walk, mask_mode="gradient", mask_fraction=0.4, **SGD)
    same(play(method, task), model)


def test_the_joint_walk_redirects_the_forget_set_alone(tiny_task: MakeTask):
    task = tiny_task(relabel="any")
    task.join()
    walk = task.walks["joint"]
    n = len(walk.images)
    drawn: set[int] = set()
    for epoch in range(40):
        x, y, other = walk.samples("repair", torch.arange(epoch * n, (epoch + 1) * n))
        rows = (x * 255).round().byte().flatten(1)
        for row, right, wanted in zip(rows, y.tolist(), other.tolist(), strict=True):
            (place,) = (walk.images.pixels.flatten(1) == row).all(1).nonzero()[:, 0].tolist()
            if place >= 12:
                assert wanted == right
            else:
                drawn.add((wanted - right) % 4)
    assert drawn == {0, 1, 2, 3}  # the true label too, as in the released code


def test_authors_presets_of_salun_have_the_released_walks():
    for dataset, walk in (("cifar10", "joint"), ("cifar100", "joint"), ("svhn", "turns"), ("celeba", "turns")):
        plan = make(method="salun", dataset=dataset, preset=f"authors/{dataset}")
        assert (plan.method.walk, plan.walked(), plan.losses.relabel) == (walk, walk, "any")


def test_the_papers_algorithm_takes_the_released_optimizer_and_batch():
    plan = make(method="scissorhands", dataset="cifar10", preset="paper")
    assert (plan.method.momentum, plan.method.weight_decay, plan.losses.batch_size) == (0.9, 5e-4, 256)
    assert (plan.method.saliency, plan.method.sensitivity_batches, plan.method.margin) == ("signed", 1, 0.0)


def test_boundary_expanding_teaches_a_class_more_and_cuts_it_off(tiny_task: MakeTask):
    task, plain = tiny_task(), tiny_task()
    wide = plain.model
    old, bound = wide.fc, 8**-0.5
    wide.fc, g = nn.Linear(8, 5), generator(0, "shadow")
    extra = [torch.empty(shape).uniform_(-bound, bound, generator=g) for shape in ((1, 8), (1,))]
    wide.fc.weight.data, wide.fc.bias.data = torch.cat([old.weight, extra[0]]), torch.cat([old.bias, extra[1]])

    def loss(model: nn.Module, step: int) -> Tensor:
        x, y = forget(plain, step)
        return F.cross_entropy(model(x), torch.full_like(y, 4))

    sgd(plain, loss, wide)
    narrow = nn.Linear(8, 4)
    narrow.weight.data, narrow.bias.data = wide.fc.weight.data[:4], wide.fc.bias.data[:4]
    wide.fc = narrow
    same(play(METHODS["be"](steps=STEPS, **SGD), task), wide)


@pytest.mark.parametrize("other_only", [True, False])
def test_boundary_shrink_teaches_the_answer_to_the_attacked_image(tiny_task: MakeTask, other_only: bool):
    task, plain = tiny_task(), tiny_task()
    before = copy.deepcopy(plain.model).eval()
    failures = 0

    def loss(model: nn.Module, step: int) -> Tensor:
        nonlocal failures
        x, y = forget(plain, step)
        x.requires_grad_()
        F.cross_entropy(before(x), y).backward()
        levels = torch.clamp((x + 0.01 * x.grad.sign()) * 255, 0, 255).round()
        logits = before(levels / 255).detach()
        failures += int((logits.argmax(1) == y).sum())
        if other_only:
            logits[range(len(y)), y] = -1e9
        return F.cross_entropy(model(x.detach()), logits.argmax(1))

    sgd(plain, loss)
    assert failures  # else both settings are one
    same(play(METHODS["bs"](steps=STEPS, epsilon=0.01, other_only=other_only, **SGD), task), plain.model)


def test_scrub_takes_max_and_min_steps_by_turns(tiny_task: MakeTask):
    task, plain = tiny_task(), tiny_task()
    teacher, T = copy.deepcopy(plain.model).eval(), 4.0
    kinds = ["max", "max", "min", "min", "min", "min", "min"]  # one epoch of 2 + 3, and one without max steps

    def loss(model: nn.Module, step: int) -> Tensor:
        x, y = forget(plain, step) if kinds[step] == "max" else retain(plain, step)
        p, q = ((net(x) / T).softmax(1) for net in (teacher, model))
        kl = T**2 * (p.detach() * (p.detach().log() - q.log())).sum(1).mean()
        if kinds[step] == "max":
            return -kl
        logits = model(x)  # a pass of its own for l: batch norms see the batch twice, as the task does
        return 0.9 * F.cross_entropy(logits, y) + 0.3 * kl

    sgd(plain, loss)
    method = METHODS["scrub"](steps=STEPS, max_epochs=1, alpha=0.3, gamma=0.9, temperature=T, **SGD)
    same(play(method, task), plain.model, atol=1e-5)


ADAM = {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1}


def test_badt_follows_an_untrained_teacher_on_the_forget_set(tiny_task: MakeTask):
    task, plain = tiny_task(augment="crop-flip"), tiny_task(augment="crop-flip")
    knows = copy.deepcopy(plain.model).eval()
    knows_nothing = badteacher.untrained(knows, 0)
    assert not torch.isclose(knows.fc.weight, knows_nothing.fc.weight).any()
    forget_pixels = plain.walks["forget"].images.pixels
    plain.join(0.3)
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-2, weight_decay=0.1)
    sizes = []
    for epoch in range(2):
        for x, y, other in one_pass(plain, "joint", "repair", epoch):
            student = (plain.model(x) / 2).softmax(1)
            loss = 0
            for i in range(len(x)):
                teacher = knows if other[i] == y[i] else knows_nothing
                p = (teacher(x[i : i + 1]).detach()[0] / 2).softmax(0)
                loss = loss + (p * (p.log() - student[i].log())).sum() / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sizes.append((len(x), int((other != y).sum())))
    assert [n for n, _ in sizes] == [8, 8, 2] * 2  # 12 to forget, 6 of 21 to retain
    assert sum(n for _, n in sizes[:3]) == len(forget_pixels)
    method = METHODS["badt"](steps=6, retain_share=0.3, temperature=2.0, **ADAM)
    same(play(method, task), plain.model, atol=1e-5)


def hits(model: nn.Module, images: Images) -> float:
    frozen = copy.deepcopy(model).eval()
    return float((frozen(images.pixels / 255).argmax(1) == images.labels).double().mean())


def test_lotus_teaches_draws_at_the_temperature_of_each_epoch(tiny_task: MakeTask):
    task, plain = tiny_task(), tiny_task()
    teacher = copy.deepcopy(plain.model).eval()
    task.unseen = plain.walks["retain"].part(0.2).images
    task.unseen = replace(task.unseen, labels=(teacher(task.unseen.pixels / 255).argmax(1) + 1) % 4)  # all wrong
    aim = hits(teacher, task.unseen)
    assert aim == 0
    plain.join(0.3)
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-2, weight_decay=0.1)
    step, taus = 0, []
    for epoch in range(2):
        tau = math.exp(2 * (hits(plain.model, plain.walks["forget"].images) - aim))
        taus.append(tau)
        for x, y, other in one_pass(plain, "joint", "repair", epoch):
            noisy = teacher(x).detach() + lotus.gumbel(plain, step, len(x), 4)
            wanted = F.one_hot(noisy.argmax(1), 4).float()
            for i in (other != y).nonzero()[:, 0].tolist():
                wanted[i] = (noisy[i] / tau).softmax(0)
            loss = F.cross_entropy(plain.model(x), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    assert len(set(taus)) == 2
    same(play(METHODS["lotus"](steps=6, alpha=2.0, **ADAM), task), plain.model, atol=1e-5)


def test_lotus_stops_where_the_forget_set_is_known_less_than_unseen_data(tiny_task: MakeTask):
    task = tiny_task()
    unseen = task.walks["retain"].images
    task.unseen = replace(unseen, labels=copy.deepcopy(task.model).eval()(unseen.pixels / 255).argmax(1))
    assert list(METHODS["lotus"](steps=6, **ADAM)(task)) == []


def test_gumbel_noise_makes_draws_of_the_softmax(tiny_task: MakeTask):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    n = 20_000
    drawn = (logits + lotus.gumbel(tiny_task(), 3, n, 4)).argmax(1).bincount(minlength=4) / n
    p = logits.softmax(0)
    assert ((drawn - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_influence_is_the_released_recursion(tiny_task: MakeTask):
    task, plain = tiny_task(), tiny_task()
    model, N, alpha = plain.model.eval(), 10, 3.0
    each = {}
    for name in ("forget", "retain"):
        x, y, _ = plain.clean(name, torch.arange(len(plain.walks[name].images)))
        each[name] = [flat_gradient(model, F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])) for i in range(len(y))]
    n_f, n_r = 12, 21
    k = sum(each["forget"]) / (n_f + n_r) - n_f / ((n_f + n_r) * n_r) * sum(each["retain"])
    o = each["retain"][0].clone()
    for index, g in enumerate(each["retain"][1:], start=1):
        s = o @ g
        k = k - (k @ g) / (N + s) * o
        o = o - s / (N + s) * o
        if index > N:
            break
    assert index == N + 1 < n_r - 1
    found = weights(play(METHODS["iu"](alpha=alpha, samples=N), task))
    torch.testing.assert_close(found, weights(model) + alpha * k, atol=1e-6, rtol=1e-4)


def test_dampening_shrinks_what_matters_to_the_forget_set(tiny_task: MakeTask):
    task, plain = tiny_task(), tiny_task()
    model = plain.model.eval()
    importance = {}
    for name, batches in (("forget", 2), ("retain", 3)):
        squares = 0
        for b in range(batches):
            x, y, _ = getattr(plain.batch("importance", b), name)
            squares = squares + flat_gradient(model, F.cross_entropy(model(x), y)) ** 2
        importance[name] = squares / batches
    everywhere = (12 * importance["forget"] + 21 * importance["retain"]) / 33
    before, expected = weights(model), weights(model).clone()
    for j in range(len(before)):
        if importance["forget"][j] > 1.5 * everywhere[j]:
            expected[j] *= min(0.4 * float(everywhere[j] / importance["forget"][j]), 1.0)
    assert 10 < (expected != before).sum() < len(before) - 10
    found = weights(play(METHODS["ssd"](alpha=1.5, lam=0.4), task))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def released(steps: int, **knobs):
    """The preset `authors/cifar10`, with fewer steps."""
    plan = make(method="scissorhands", dataset="cifar10", preset="authors/cifar10")
    method = replace(plan.method, steps=steps, **knobs)
    assert (method.margin, method.ridge, method.memory_scope) == (0.5, 1e-3, "layer3|layer4|fc")
    losses = plan.losses
    scopes = {"trim_scope": losses.trim_scope, "rank_scope": losses.rank_scope, "batch_norm": losses.batch_norm}
    return method, scopes


def in_scope(name: str) -> bool:
    return "layer3" in name or "layer4" in name or "fc" in name


def snip(task: ClassificationTask, kappa: float) -> None:
    """Released: |g| |theta| over all weights, strictly above the int(kappa N)-th smallest; norms are never reset."""
    model = task.model
    norms = {"bn1.weight", "bn1.bias", "layer3.1.weight", "layer3.1.bias", "layer4.1.weight", "layer4.1.bias"}
    x, y, _ = task.batch("sensitivity", 0).forget
    scores = (flat_gradient(model, F.cross_entropy(model(x), y)).abs() * weights(model).abs()).tolist()
    threshold = sorted(scores)[int(kappa * len(scores)) - 1]
    start = 0
    for name, p in model.named_parameters():
        mask = torch.tensor(scores[start : start + p.numel()]).view(p.shape) > threshold
        start += p.numel()
        if in_scope(name) and name not in norms:
            bound = 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.0
            new = torch.empty(int(mask.sum())).uniform_(-bound, bound, generator=generator(0, "trim", name))
            p.data[mask] = new


def project2cone2(gradient: np.ndarray, memory: np.ndarray, margin: float = 0.5, eps: float = 1e-3) -> np.ndarray:
    """As in the released code: float64, one column of memories."""
    P = memory[None] @ memory[None].T + eps * np.eye(1)
    v = quadprog.solve_qp(P, -memory[None] @ gradient, np.eye(1), np.full(1, margin))[0]
    return v @ memory[None] + gradient


def reference(task: ClassificationTask, lam: float, steps: int) -> int:
    """The released loop step by step; returns in how many steps it projected."""
    model, acted = task.model, 0
    snip(task, kappa=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-3, momentum=0.9, weight_decay=5e-4)
    subset = [p for name, p in model.named_parameters() if in_scope(name)]
    for step in range(steps):
        epoch, position = divmod(step, 3)  # 21 images to retain
        if position == 0:
            proxy = copy.deepcopy(model).eval()
            x, y, _ = task.batch("memory", epoch).forget
            (-F.cross_entropy(proxy(x), y)).backward()
            memory = [p.grad.flatten() for name, p in proxy.named_parameters() if in_scope(name)]
            m = torch.cat(memory).double().numpy()
        optimizer.zero_grad()
        x, y, _ = list(one_pass(task, "retain", "repair", epoch))[position]
        loss = F.cross_entropy(model(x), y)
        if position < 2:  # 12 images to forget
            x, y, _ = list(one_pass(task, "forget", "repair", epoch))[position]
            loss = loss - lam * F.cross_entropy(model(x), y)
        loss.backward()
        u = torch.cat([p.grad.flatten() for p in subset]).double().numpy()
        if position < 2 and u @ m < 0:
            acted += 1
            rest = torch.from_numpy(project2cone2(u, m)).float()
            for p in subset:
                p.grad = rest[: p.numel()].view(p.shape)
                rest = rest[p.numel() :]
        optimizer.step()
    return acted


def test_the_released_preset_is_the_released_code(tiny_task: MakeTask):
    method, losses = released(9, fraction=0.1)
    task, plain = tiny_task(**losses), tiny_task()
    before = weights(task.model).clone()
    acted = reference(plain, lam=method.lam, steps=9)
    assert 0 < acted < 6  # of the joint steps of three epochs
    found = play(method, task)
    assert (weights(found) - before).abs().max() > 0.05
    same(found, plain.model, atol=1e-6)


def test_the_memory_is_stale_scoped_and_measured_in_evaluation_mode(tiny_task: MakeTask):
    method, losses = released(9)
    task = tiny_task(**losses)
    kept = [dict(state["kept"]) for record, state in method(task) if record.get("step") is not None]
    assert set(kept[0]) == {name for name in task.trainable() if in_scope(name)}
    same_as_before = []
    for before, after in pairwise(kept):
        same_as_before.append(torch.equal(before["fc.weight"], after["fc.weight"]))
    assert same_as_before == [True, True, False, True, True, False, True, True]
    assert task.model.training


def test_project_every_counts_the_joint_steps(tiny_task: MakeTask):
    method, losses = released(9, project_every=2, lam=0.0)
    task = tiny_task(**losses)
    task.forget = task.retain  # g_f is g_r: every projection bites
    bits = [record["bit"] for record, _ in method(task) if "bit" in record]
    assert bits == [False, True, False] * 3


def test_saliency_on_a_share_of_the_forget_set_sees_no_other_example(tiny_task: MakeTask):
    task = tiny_task()
    method = METHODS["scissorhands"](fraction=0.1, trim_share=0.25, sensitivity_batches=3)
    seen = []
    plain_loss = task.forget

    def loss(batch):
        seen.append(batch.forget.x)
        return plain_loss(batch)

    task.forget = loss
    list(method.trim(task))
    assert sum(map(len, seen)) == 24
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 3
    assert len(task.walks["forget"].images) == 12
    with pytest.raises(UserError, match="--trim_share 0"):
        METHODS["scissorhands"](trim_share=0.0)


RESUMED = {name: {"steps": STEPS, **SGD} for name in METHODS if name not in ("iu", "ssd", "nothing")}
RESUMED |= {"iu": {"samples": 5}, "ssd": {"alpha": 1.0}}


class Killed(Exception):
    """Stands for kill -9."""


SALUN = {name: {"walk": name, "steps": STEPS, **SGD} for name in ("joint", "turns")}


def resumable(name: str):
    """The method of this name, or SalUn with this walk, and the settings of its task."""
    if name == "released":
        return released(STEPS)
    if name in SALUN:
        return METHODS["salun"](**SALUN[name]), {}
    return METHODS[name](**RESUMED[name]), {}


@pytest.mark.parametrize("name", [*RESUMED, *SALUN, "released"])
def test_resumed_equals_uninterrupted(tiny_task: MakeTask, tmp_path: Path, name: str):
    """Through the folder of a run, so that batch norms' statistics and all that a method keeps are in it."""
    method, losses = resumable(name)
    end = method.steps

    def go(folder: Path, dies_at: int | None) -> nn.Module:
        task = tiny_task(**losses)

        def check(step: int) -> None:
            if step == dies_at:
                raise Killed

        with RunFolder(folder, {"name": name}) as place:
            run(method, task, task.model.state_dict(), place, every=1, check=check, description=name)
        return task.model

    whole = go(tmp_path / "whole", None)
    assert any(not torch.equal(x, whole.state_dict()[n]) for n, x in tiny_task().model.state_dict().items())
    if end > 1:
        with pytest.raises(Killed):
            go(tmp_path / "cut", dies_at=5)  # checkpoint 4 is the last one
    again = go(tmp_path / "cut" if end > 1 else tmp_path / "whole", None)
    for key, x in whole.state_dict().items():
        assert torch.equal(x, again.state_dict()[key]), key


def test_gradient_of_the_shadow_class_is_cleared_between_losses(tiny_task: MakeTask):
    """It belongs to the model while it is there, so that the mean over ranks and the clearing reach it."""
    task = tiny_task()
    with Widened(task.model, 0) as widened:
        inside = dict(task.model.named_parameters())
        assert {"fc.shadow.weight", "fc.shadow.bias"} <= inside.keys()
        x, y = forget(task, 0)

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(widened.logits(task.logits(x)), torch.full_like(y, 4))

        g = gradient(task, loss, x, dict(widened.shadow.named_parameters()))
        assert g["weight"].abs().sum() > 0
        assert widened.shadow.weight.grad is None
    assert "fc.shadow.weight" not in dict(task.model.named_parameters())
