"""The task of a classifier: which samples a step sees, and its losses by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from classification.task import ClassificationTask
from erase_sd.common.errors import UserError

MakeTask = Callable[..., ClassificationTask]


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_ranks_share_the_batch_that_one_process_sees(tiny_task: MakeTask, name: str, augment: str):
    for step in range(4):
        whole = getattr(tiny_task(augment=augment).batch("repair", step), name)
        for ranks in (2, 4):
            for rank in range(ranks):
                part = getattr(tiny_task(ranks, rank, augment).batch("repair", step), name)
                for mine, all_of_it in zip(part, whole, strict=True):
                    assert torch.equal(mine, all_of_it[rank::ranks])


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own(tiny_task: MakeTask):
    walk = tiny_task().walks["retain"]
    n = len(walk.images)
    orders = []
    for purpose, epoch in (("repair", 0), ("repair", 1), ("memory", 0)):
        x = walk.samples(purpose, torch.arange(epoch * n, (epoch + 1) * n)).x
        pixels = (x * 255).round().byte().flatten(1).tolist()
        orders.append([walk.images.pixels.flatten(1).tolist().index(row) for row in pixels])
        assert sorted(orders[-1]) == list(range(n))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_position_is_the_same_sample_however_it_is_asked_for(tiny_task: MakeTask):
    walk, fresh = tiny_task(augment="crop-flip").walks["forget"], tiny_task(augment="crop-flip").walks["forget"]
    late = walk.samples("repair", torch.arange(100, 108))  # across the end of an epoch of 12
    for i in reversed(range(8)):
        one = fresh.samples("repair", torch.tensor([100 + i]))
        for part, whole in zip(one, late, strict=True):
            assert torch.equal(part[0], whole[i])


def test_augmentation_differs_between_epochs(tiny_task: MakeTask):
    walk = tiny_task(augment="crop-flip").walks["forget"]
    first = walk.samples("repair", torch.arange(12)).x.flatten(1).tolist()
    second = walk.samples("repair", torch.arange(12, 24)).x.flatten(1).tolist()
    again = [image for image in second if image in first]
    assert len(again) <= 2  # of 12: two draws of 162 may be one


def test_the_other_label_is_never_the_true_one_and_may_be_any(tiny_task: MakeTask):
    samples = tiny_task().walks["forget"].samples("repair", torch.arange(1200))
    assert (samples.other != samples.y).all()
    for y in samples.y.unique().tolist():
        others = set(samples.other[samples.y == y].tolist())
        assert others == {0, 1, 2, 3} - {y}


def test_a_part_of_a_walk_is_one_subset(tiny_task: MakeTask):
    walk = tiny_task().walks["retain"]
    assert walk.part(1.0) is walk
    part = walk.part(0.3)
    assert len(part.images) == 6
    assert len(set(part.images.ids)) == 6
    assert set(part.images.ids) < set(walk.images.ids)
    assert part.images.ids == walk.part(0.3).images.ids
    assert len(walk.part(0.001).images) == 1


def by_hand(task: ClassificationTask, x: Tensor, y: Tensor) -> float:
    """Mean of -log of the softmax of the right answer, in Python's floats."""
    total = 0.0
    for row, right in zip(task.model(x).tolist(), y.tolist(), strict=True):
        total += math.log(sum(map(math.exp, row))) - row[right]
    return total / len(y)


def test_losses_are_cross_entropies_by_hand(tiny_task: MakeTask):
    task = tiny_task(batch_norm="eval")
    batch = task.batch("repair", 3)
    forget, retain = batch.forget, batch.retain
    assert task.forget(batch).item() == pytest.approx(by_hand(task, forget.x, forget.y), rel=1e-5)
    assert task.retain(batch).item() == pytest.approx(by_hand(task, retain.x, retain.y), rel=1e-5)
    assert task.redirect(batch).item() == pytest.approx(by_hand(task, forget.x, forget.other), rel=1e-5)
    difference = by_hand(task, forget.x, forget.y) - by_hand(task, forget.x, forget.other)
    assert task.contrast(batch).item() == pytest.approx(difference, rel=1e-4)


def test_the_nearest_label_is_the_original_networks_runner_up(tiny_task: MakeTask):
    task = tiny_task(batch_norm="eval", relabel="nearest")
    batch = task.batch("repair", 0)
    expected = []
    for row, y in zip(task.model(batch.forget.x).tolist(), batch.forget.y.tolist(), strict=True):
        row[y] = -math.inf
        expected.append(row.index(max(row)))
    change(task)  # the labels stay those of the network before
    found = task.redirect(batch).item()
    assert found == pytest.approx(by_hand(task, batch.forget.x, torch.tensor(expected)), rel=1e-5)


def change(task: ClassificationTask) -> None:
    with torch.no_grad():
        task.model.fc.weight.mul_(-1)


def test_preserving_is_zero_until_something_changes(tiny_task: MakeTask):
    task = tiny_task(batch_norm="eval")
    batch = task.batch("repair", 0)
    assert task.preserve(batch).item() == pytest.approx(0, abs=1e-6)
    p = task.model(batch.retain.x).softmax(1).double()
    change(task)
    q = task.model(batch.retain.x).softmax(1).double()
    assert task.preserve(batch).item() == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)


def test_batch_norms_use_the_statistics_that_are_asked_for(tiny_task: MakeTask):
    for mode, moved in (("train", True), ("eval", False)):
        task = tiny_task(batch_norm=mode)
        task.forget(task.batch("repair", 0))
        assert bool(task.model.bn1.running_mean.abs().sum() > 0) is moved


def test_scopes_go_by_name_and_norms_are_never_trimmed(tiny_task: MakeTask):
    task = tiny_task(trim_scope="layer3|fc", train_scope="layer4", rank_scope="conv|fc")
    assert list(task.trimmable()) == ["layer3.0.weight", "fc.weight", "fc.bias"]
    assert list(task.trainable()) == ["layer4.0.weight", "layer4.1.weight", "layer4.1.bias"]
    assert list(task.ranked()) == ["conv1.weight", "fc.weight", "fc.bias"]
    assert tiny_task().ranked().keys() == tiny_task().trimmable().keys()
    for knob in ("trim_scope", "train_scope", "rank_scope"):
        with pytest.raises(UserError, match=f"--{knob} 'layer9' matches no parameter"):
            tiny_task(**{knob: "layer9"})
        with pytest.raises(UserError, match=f"--{knob} '\\[' is no regular expression"):
            tiny_task(**{knob: "["})


def test_epochs_are_counted_in_whole_batches(tiny_task: MakeTask):
    for batch_size, steps in ((1, 21), (7, 3), (8, 3), (21, 1), (22, 1)):
        assert tiny_task(batch_size=batch_size).epoch("retain") == steps


def test_clean_samples_are_the_examples_themselves(tiny_task: MakeTask):
    task = tiny_task(augment="crop-flip")
    x, y, other = task.clean("forget", torch.tensor([3, 1]))
    images = task.walks["forget"].images
    assert torch.equal(x, images.pixels[[3, 1]] / 255)
    assert torch.equal(y, images.labels[[3, 1]])
    assert torch.equal(other, (y + 1) % 4)


def test_work_is_counted_in_samples(tiny_task: MakeTask):
    task = tiny_task()
    batch = task.batch("repair", 0)
    task.backward(task.retain(batch) - task.forget(batch))
    assert task.samples == {"forward": 16, "backward passes": 1}
