"""Every metric against an oracle that was written without it: loops, scikit-learn, scipy, closed forms, print."""

import copy
import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC
from torch import nn
from torch.nn import functional as F

from classification.data.dataset import Images
from classification.metrics import gap, gradcam, lira, mia
from classification.metrics.accuracy import accuracy, evaluating, logits, scaled
from classification.metrics.distance import distance
from classification.metrics.relearn import relearn, shown
from classification.models.networks import build
from erase_sd.common.errors import UserError
from erase_sd.common.rng import keyed_rng

PAPER = Path(gap.__file__).parents[1] / "reporting" / "paper_tables.csv"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 12, channels: int = 3, size: int = 8, classes: int = 3, seed: int = 0) -> Images:
    g = rng(seed)
    pixels = torch.randint(0, 256, (n, channels, size, size), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, classes, (n,), generator=g)
    return Images(pixels=pixels, labels=labels, ids=tuple(str(i) for i in range(n)))


def small(classes: int = 3, channels: int = 3, seed: int = 0) -> nn.Module:
    return build(
        "smallnet", classes=classes, channels=channels, mean=[0.5] * channels, std=[0.3] * channels, seed=seed
    )


# accuracy


def test_logits_are_the_eval_answers_and_the_layers_stay_in_their_modes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model.train()
    model[2].eval()  # a frozen layer
    model[2].running_mean += 1
    x = pictures(7)
    found = logits(model, x, batch_size=3)
    assert [layer.training for layer in model] == [True, True, False, True]
    assert model.training
    assert not found.requires_grad
    assert found.shape == (7, 3)
    y = (x.pixels.numpy().reshape(7, -1) / 255) @ model[1].weight.detach().numpy().T + model[1].bias.detach().numpy()
    np.testing.assert_allclose(found, (y - 1) / math.sqrt(1 + 1e-5), atol=1e-5)


def test_modes_come_back_after_an_error():
    model = small().train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.layer1.training
        raise ZeroDivisionError
    assert model.layer1.training


def test_accuracy_counts():
    z = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert accuracy(z, torch.tensor([1, 1, 1])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no examples"):
        accuracy(z[:0], torch.tensor([]))


# membership inference


def answers(n: int, seed: int, sharp: float) -> mia.Outputs:
    """Logits that favour the true class the more, the larger `sharp` is."""
    labels = torch.randint(0, 4, (n,), generator=rng(seed))
    return mia.Outputs(torch.randn(n, 4, generator=rng(seed + 1)) + sharp * F.one_hot(labels, 4), labels)


RETAIN, TEST, FORGET = answers(120, 1, 4.0), answers(80, 3, 1.5), answers(50, 5, 2.5)


def by_loops(name: str, x: mia.Outputs) -> np.ndarray:
    """A feature (N, d), one example and one class at a time, as the papers write it."""
    table = []
    for z, y in zip(x.logits.double().tolist(), x.labels.tolist(), strict=True):
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        others = [q for k, q in enumerate(p) if k != y]
        value = {
            "correctness": [float(max(range(len(p)), key=p.__getitem__) == y)],
            "confidence": [p[y]],
            "entropy": [-sum(q * math.log(q) for q in p)],
            "m_entropy": [-(1 - p[y]) * math.log(p[y]) - sum(q * math.log(1 - q) for q in others)],
            "prob": p,
        }[name]
        table.append(value)
    return np.array(table)


@pytest.mark.parametrize("name", mia.FEATURES)
def test_features_are_the_formulas(name):
    found = mia.FEATURES[name](mia.probabilities(FORGET), FORGET.labels)
    np.testing.assert_allclose(found, by_loops(name, FORGET), rtol=1e-9)


def test_features_of_certain_answers_are_finite():
    sure = mia.Outputs(torch.tensor([[1e4, 0.0], [1e4, 0.0]]), torch.tensor([0, 1]))
    for name, feature in mia.FEATURES.items():
        assert feature(mia.probabilities(sure), sure.labels).isfinite().all(), name
    right, wrong = mia.m_entropy(mia.probabilities(sure), sure.labels)[:, 0].tolist()
    assert right == 0
    assert wrong > 100


@pytest.mark.parametrize("name", mia.FEATURES)
def test_svc_attack_is_scikit_learns(name):
    """The released procedure written out: the first n_t of D_r against all of D_t."""
    x = np.concatenate([by_loops(name, RETAIN)[:80], by_loops(name, TEST)])
    svc = SVC(C=3, gamma="auto", kernel="rbf").fit(x, [1] * 80 + [0] * 80)
    expected = sum(svc.predict(by_loops(name, FORGET)) == 0) / 50
    assert mia.svc_attack(RETAIN, TEST, FORGET, features=[name], shadow="first") == {name: pytest.approx(expected)}
    assert 0 < expected < 1


def test_random_shadows_are_a_matter_of_the_seed_and_see_more_than_the_first():
    """The second half of these members looks like nothing else, as in a data set sorted by class."""
    before = torch.get_rng_state()
    ordered = mia.Outputs(torch.cat([RETAIN.logits[:60], -RETAIN.logits[60:]]), RETAIN.labels)
    first = mia.svc_attack(ordered, TEST, FORGET, shadow="first", cap=60)
    drawn = [mia.svc_attack(ordered, TEST, FORGET, cap=60, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[1:] != [drawn[1]] * 3
    assert first not in drawn
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cap_limits_both_shadow_sets(monkeypatch):
    sizes = []
    monkeypatch.setattr(mia, "_unseen", lambda members, others, forget: sizes.append((len(members), len(others))))
    for cap in (None, 30, 500):
        mia.svc_attack(RETAIN, TEST, FORGET, cap=cap)
        mia.svc_attack(TEST, RETAIN, FORGET, cap=cap)
    assert sizes == [(80, 80), (80, 80), (30, 30), (30, 30), (80, 80), (80, 80)]


def test_svc_attack_refuses_what_it_cannot_attack():
    with pytest.raises(UserError, match="unknown MIA feature loss: choose among correctness, confidence"):
        mia.svc_attack(RETAIN, TEST, FORGET, features=["loss"])
    nothing = mia.Outputs(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    for sets in ((nothing, TEST, FORGET), (RETAIN, nothing, FORGET), (RETAIN, TEST, nothing)):
        with pytest.raises(ValueError, match="needs examples"):
            mia.svc_attack(*sets)


# U-LiRA


def shadows(shift: float, models: int = 6, n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    hard = torch.randn(n, generator=rng(1), dtype=torch.float64) * 3
    u, v = torch.randn(2, models, n, generator=rng(2), dtype=torch.float64)
    return hard + u + shift, hard + v


def test_confidence_is_the_log_odds_even_where_a_probability_rounds_to_one():
    z, y = torch.tensor([[0.3, 1.0, -2.0], [100.0, 0.0, 0.0]]), torch.tensor([1, 0])
    p = math.exp(1.0) / (math.exp(0.3) + math.exp(1.0) + math.exp(-2.0))
    assert lira.confidence(z, y).tolist() == pytest.approx([math.log(p / (1 - p)), 100 - math.log(2)], rel=1e-6)


@pytest.mark.parametrize("pooled", [False, True])
def test_log_ratio_is_that_of_scipys_densities(pooled):
    u, v = shadows(1.0)
    x = torch.randn(3, 40, generator=rng(3), dtype=torch.float64)
    stds = [np.std(s.numpy(), axis=0, ddof=1) for s in (u, v)]
    if pooled:
        stds = [np.sqrt(np.mean(s**2)) for s in stds]
    expected = norm.logpdf(x, u.numpy().mean(0), stds[0]) - norm.logpdf(x, v.numpy().mean(0), stds[1])
    np.testing.assert_allclose(lira.log_ratio(x, u, v, pooled=pooled), expected)
    np.testing.assert_allclose(lira.log_ratio(x[0], u, v, pooled=pooled), expected[0])


def test_attack_holds_one_pair_out_and_counts():
    u, v = shadows(1.5)
    hits, alarms = [], []
    for i in range(6):
        rest_u, rest_v = np.delete(u.numpy(), i, axis=0), np.delete(v.numpy(), i, axis=0)
        mu, su = rest_u.mean(0), rest_u.std(0, ddof=1)
        mv, sv = rest_v.mean(0), rest_v.std(0, ddof=1)
        for scores, x in ((hits, u[i].numpy()), (alarms, v[i].numpy())):
            scores.extend(norm.logpdf(x, mu, su) - norm.logpdf(x, mv, sv))
    found = lira.attack(u, v, fpr=0.1)
    assert found.accuracy == pytest.approx((sum(np.array(hits) > 0) + sum(np.array(alarms) < 0)) / 480)
    assert found.auc == pytest.approx(roc_auc_score([1] * 240 + [0] * 240, hits + alarms))
    threshold = sorted(alarms)[-25]  # 24 of 240 alarms lie above it
    assert found.tpr == pytest.approx(sum(np.array(hits) > threshold) / 240)
    assert 0.6 < found.accuracy < 1
    assert found.fpr == 0.1


@pytest.mark.parametrize("pooled", [False, True])
def test_attack_on_equal_models_is_a_coin_and_on_far_ones_certain(pooled):
    """Four models a side: leaving single models out would push the accuracy well below one half."""
    assert lira.attack(*shadows(0.0, 4, 20_000), pooled=pooled)[:2] == pytest.approx((0.5, 0.5), abs=0.01)
    assert lira.attack(*shadows(0.0, 4, 20_000), pooled=pooled).tpr == pytest.approx(0.01, abs=0.005)
    assert lira.attack(*shadows(50.0), pooled=pooled)[:3] == pytest.approx((1, 1, 1))


def test_attack_on_models_that_agree_to_the_last_digit_is_undecided():
    same = torch.ones(3, 5)
    assert lira.attack(same, same)[:2] == (0.5, 0.5)


def test_attack_needs_models():
    with pytest.raises(ValueError, match="two shadow models or more, not 1"):
        lira.attack(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="as many models of each kind"):
        lira.attack(torch.zeros(4, 5), torch.zeros(3, 5))


# gap


def paper_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(PAPER.read_text().splitlines()))


@pytest.mark.parametrize(
    "row", [r for r in paper_rows() if r["avg_gap"]], ids=lambda r: f"{r['dataset']}-{r['method']}"
)
def test_the_papers_avg_gap_follows_from_its_rows(row):
    table = gap.paper(row["dataset"])
    found = gap.avg_gap(table[row["method"]], table["Retrain"])
    if (row["dataset"], row["method"]) == ("svhn", "l1-sparse"):  # its acc_t is a copy of SalUn's
        assert found == pytest.approx(4.5825)
        assert row["avg_gap"] == "4.65"
        assert table["l1-sparse"]["acc_t"] == table["SalUn"]["acc_t"]
    else:
        assert found == pytest.approx(float(row["avg_gap"]), abs=0.005 + 1e-9)


def test_the_papers_tables_are_whole():
    assert len(paper_rows()) == 36
    table = gap.paper("cifar10")
    assert list(table) == ["Retrain", "FT", "GA", "IU", "BE", "BS", "l1-sparse", "SalUn", "Scissorhands"]
    assert list(table["Scissorhands"].values()) == [95.40, 1.48, 92.92, 0.48, 98.93, 0.57, 9.56, 2.13, 1.62]
    assert list(table["Scissorhands"])[::2] == [*gap.AXES, "avg_gap"]
    assert "avg_gap" not in table["Retrain"]
    with pytest.raises(UserError, match="no table of digits: choose among celebamask-hq, cifar10, cifar100, svhn"):
        gap.paper("digits")


def test_tow_and_rte():
    row, retrain = {"acc_f": 0.9, "acc_t": 0.8, "acc_r": 1.0}, {"acc_f": 0.7, "acc_t": 0.9, "acc_r": 1.0}
    assert gap.tow(row, retrain) == pytest.approx(0.8 * 0.9)
    assert gap.tow(retrain, retrain) == 1
    percent = [{"acc_f": 90, "acc_t": 80, "acc_r": 100}, {"acc_f": 70, "acc_t": 90, "acc_r": 100}]
    assert gap.tow(*percent, full=100) == pytest.approx(0.72)
    with pytest.raises(ValueError, match="give full=100"):
        gap.tow(*percent)
    assert gap.rte(30, 120) == 0.25


# distance


def test_distances_are_scipys():
    a, b = torch.randn(2, 9, 5, generator=rng(), dtype=torch.float64) * 3
    p, q = softmax(b.numpy()), softmax(a.numpy())
    found = distance(a, b)
    assert found.js == pytest.approx(np.mean(jensenshannon(p, q, axis=1) ** 2))
    assert found.kl == pytest.approx(np.mean(scipy_entropy(p, q, axis=1)))
    assert found.disagreement == np.mean(p.argmax(1) != q.argmax(1))
    assert 0 < found.disagreement < 1
    assert distance(b, a).js == pytest.approx(found.js)
    assert distance(b, a).kl != pytest.approx(found.kl)
    assert distance(a, a) == (0, 0, 0)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def test_distances_of_certain_answers_are_finite():
    a, b = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    assert distance(a, b) == pytest.approx((math.log(2), 1e4, 1.0))
    with pytest.raises(ValueError, match="same examples and classes"):
        distance(a, a[:, :1])


# relearn


def test_relearn_counts_the_epochs_of_a_copy():
    """The epochs, once more by hand: full batches make the order of examples irrelevant."""
    forget = pictures(12)
    model = small().eval()
    model.layer1.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    found = relearn(model, forget, target=0.9, seed=0, lr=0.05)
    assert torch.equal(torch.get_rng_state(), state)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert not model.training
    assert not model.layer1[0].weight.requires_grad
    twin = small()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    epochs = 0
    while (twin(scaled(forget.pixels)).argmax(1) == forget.labels).double().mean() < 0.9:
        optimizer.zero_grad()
        F.cross_entropy(twin(scaled(forget.pixels)), forget.labels).backward()
        optimizer.step()
        epochs += 1
    assert found == epochs > 1
    assert relearn(model, forget, target=0.9, seed=0, lr=0.05, max_epochs=epochs) == epochs
    assert relearn(model, forget, target=0.9, seed=0, lr=0.05, max_epochs=epochs - 1) is None
    assert relearn(model, forget, target=0.9, seed=0, lr=0.05, tol=0.9) == 0
    assert (shown(epochs, 200), shown(None, 200)) == (str(epochs), ">200")


def test_relearn_can_train_on_the_retain_set_as_well():
    """The retain set calls the same images by other labels: with it, D_f is never learnt."""
    forget = pictures(12)
    contrary = Images(pixels=forget.pixels, labels=(forget.labels + 1) % 3, ids=forget.ids)
    settings = {"target": 1.0, "seed": 0, "lr": 0.05, "batch_size": 24, "max_epochs": 60}
    assert relearn(small(), forget, **settings) is not None
    assert relearn(small(), forget, retain=contrary, **settings) is None


def test_relearn_follows_its_seed_and_nothing_else():
    """Small batches, dropout and all, whatever the global state is."""
    with keyed_rng(0, "test"):
        model = nn.Sequential(small(16), nn.Dropout(0.5), nn.Linear(16, 3))
    found = []
    for seed, elsewhere in ((1, 5), (1, 6), (1, 7), (2, 5), (3, 5), (4, 5)):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        found.append(relearn(model, pictures(), seed=seed, target=1.0, lr=0.02, batch_size=4, max_epochs=150))
        assert torch.equal(torch.get_rng_state(), before)
    assert len(set(found[:3])) == 1
    assert len(set(found)) > 1


def test_relearn_steps_as_defined(monkeypatch):
    made = []
    monkeypatch.setattr(torch.optim, "SGD", lambda _, **options: made.append(options))
    assert relearn(small(), pictures(), target=0.0, seed=0) == 0
    assert made == [{"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}]


def test_relearn_says_that_it_diverged():
    with pytest.raises(FloatingPointError, match="lower its learning rate"):
        relearn(small(), pictures(), target=1.1, seed=0, lr=1e9, max_epochs=20)


# Grad-CAM


class Linear(nn.Module):
    """logit_k = sum_c w_kc mean_xy(A_c), A = a fixed 1x1 convolution: d logit_k / d A_c = w_kc / (h w) everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)
        self.conv.weight.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])[..., None, None]
        self.w = nn.Parameter(torch.tensor([[2.0, -1.0], [-1.0, 3.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3)) @ self.w.T


@pytest.mark.parametrize("frozen", [False, True])
def test_cam_of_a_linear_model_is_the_closed_form(frozen):
    model = Linear().requires_grad_(not frozen)
    x, k = torch.rand(3, 2, 5, 4, generator=rng()), torch.tensor([0, 1, 0])
    with torch.no_grad():  # as callers measure
        found = gradcam.cam(model, model.conv, x, k)
    # class 0: 2 x_0 - (x_0 + x_1) = x_0 - x_1; class 1: -x_0 + 3 (x_0 + x_1) = 2 x_0 + 3 x_1; over h w = 20
    x0, x1 = x[:, 0].numpy(), x[:, 1].numpy()
    heat = np.maximum(np.stack([x0[0] - x1[0], 2 * x0[1] + 3 * x1[1], x0[2] - x1[2]]), 0) / 20
    heat = heat - heat.min((1, 2), keepdims=True)
    np.testing.assert_allclose(found, heat / (1e-7 + heat.max((1, 2), keepdims=True)), atol=1e-5)
    assert not found.requires_grad
    assert model.w.grad is None
    assert not x.requires_grad


def test_cam_leaves_the_model_as_it_was():
    model = build("resnet18", classes=4, channels=3, mean=[0.5] * 3, std=[0.3] * 3, seed=0).train()
    statistics = model.bn1.running_mean.clone()
    x = torch.rand(2, 3, 32, 32, generator=rng())
    found = gradcam.cam(model, model.layer4[-1], x, torch.tensor([0, 3]))
    assert found.shape == (2, 32, 32)
    assert found.min() >= 0
    assert 0.5 < found.max() <= 1
    assert model.training
    assert torch.equal(model.bn1.running_mean, statistics)
    assert not model.layer4[-1]._forward_hooks
    assert model.fc.weight.grad is None


def test_cam_is_enlarged_bilinearly():
    """A 2x2 map under an 8x8 image: pixel i lies at (i + 1/2)/4 - 1/2 between the cells 0 and 1."""
    pool = nn.AvgPool2d(4)
    model = nn.Sequential(pool, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    cells = np.array([[0.0, 1.0], [0.25, 0.5]])
    x = torch.tensor(np.kron(cells, np.ones((4, 4))), dtype=torch.float32)[None, None]
    w = np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1)
    along = np.stack([1 - w, w], 1)
    found = gradcam.cam(model, pool, x, torch.tensor([0]))
    np.testing.assert_allclose(found[0], along @ cells @ along.T, atol=1e-5)


def test_cam_removes_its_hook_after_an_error():
    model = small()
    with pytest.raises(RuntimeError):
        gradcam.cam(model, model.layer4[-1], torch.rand(1, 5, 8, 8), torch.tensor([0]))
    assert not model.layer4[-1]._forward_hooks


def test_overlay_is_half_image_half_heat():
    x, heat = torch.full((1, 1, 2, 2), 0.6), torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    found = gradcam.overlay(x, heat)
    cold, hot = found[0, :, 0, 0], found[0, :, 0, 1]
    assert found.shape == (1, 3, 2, 2)
    assert found.max() == 1
    assert cold[2] > cold[0]  # blue and red
    assert hot[0] > hot[2]
    assert (hot[1] / hot[0]).item() == pytest.approx(0.6 / 1.1, abs=0.01)  # jet(1) is (0.5, 0, 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_figure_has_a_row_per_image_and_a_column_per_model(channels):
    models = {"Retrain": small(3, channels, 0), "Scissorhands": small(3, channels, 1)}
    forget, retain = pictures(2, channels), pictures(3, channels, seed=1)
    seen = []

    def spy(rows, row_labels, column_labels, scale):
        seen.append((rows, row_labels, column_labels))
        return rows[0][0]

    original, gradcam.sheet = gradcam.sheet, spy
    try:
        gradcam.figure(models, forget, retain)
    finally:
        gradcam.sheet = original
    rows, row_labels, column_labels = seen[0]
    assert row_labels == ["D_f"] * 2 + ["D_r"] * 3
    assert column_labels == ["image", "Retrain", "Scissorhands"]
    assert [len(row) for row in rows] == [3] * 5
    first = np.asarray(rows[2][0])
    assert (first.transpose(2, 0, 1) == retain.pixels[0].numpy()).all()
    assert (np.asarray(rows[0][1]) != np.asarray(rows[0][2])).any()
    assert gradcam.figure(models, forget, retain, scale=4).width > 3 * 32
