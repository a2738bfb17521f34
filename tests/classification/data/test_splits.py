"""Splits and forget sets: the authors' draws are reproduced, ours are fair, and bad requests are named."""

import numpy as np
import pytest
import torch

from classification.data import splits
from classification.data.dataset import Images
from classification.data.sources import load
from classification.data.splits import forget_rows, validation_split
from erase_sd.common.errors import UserError

SVHN_COUNTS = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]  # of the released training set
SEED_2 = [172, 131, 7, 84, 164, 295, 241, 300, 141, 112, 204, 282, 291, 65, 179]  # a comment in the authors' code
SEED_2 += [94, 173, 268, 215, 13, 3, 66, 30, 262, 29, 89, 180, 182, 181, 191]


def pool(labels) -> Images:
    labels = torch.as_tensor(labels)
    ids = tuple(f"part/{row}" for row in range(len(labels)))
    return Images(pixels=torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels=labels, ids=ids)


@pytest.fixture(autouse=True)
def untouched():
    """Nothing here may use the global generators."""
    legacy, state = np.random.get_state()[1].copy(), torch.get_rng_state()
    yield
    assert (np.random.get_state()[1] == legacy).all()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("labels", "sizes"),
    [
        (np.arange(50_000) % 10, (45_000, 5_000)),
        (np.arange(50_000) % 100, (45_000, 5_000)),
        (np.repeat(np.arange(10), SVHN_COUNTS), (65_937, 7_320)),
    ],
)
def test_validation_has_the_published_size_and_the_authors_rows(labels, sizes):
    train, val = validation_split(torch.from_numpy(labels), split_seed=3)
    assert (len(train), len(val)) == sizes
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(labels)))
    assert torch.equal(train, train.sort().values)
    draw, expected = np.random.RandomState(3), []
    for c in range(labels.max() + 1):
        of_class = np.where(labels == c)[0]
        expected += draw.choice(of_class, int(0.1 * len(of_class)), replace=False).tolist()
    assert val.tolist() == expected


def test_validation_is_reproducible_and_may_be_empty():
    labels = torch.arange(300) % 3
    assert torch.equal(validation_split(labels, 5)[1], validation_split(labels, 5)[1])
    assert not torch.equal(validation_split(labels, 5)[1], validation_split(labels, 6)[1])
    train, val = validation_split(labels, 5, share=0)
    assert torch.equal(train, torch.arange(300))
    assert len(val) == 0


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_validation_leaves_something_to_train_on(share):
    with pytest.raises(UserError, match="outside"):
        validation_split(torch.arange(10), 1, share)


@pytest.mark.parametrize(("seed", "authors"), [(-1, True), (2**32, True)])
def test_legacy_seeds_have_a_range(seed, authors):
    with pytest.raises(UserError, match=r"outside 0..2\*\*32-1"):
        validation_split(torch.arange(10), seed)
    with pytest.raises(UserError, match=r"outside 0..2\*\*32-1"):
        forget_rows("identities:3", pool(torch.arange(10)), seed, authors=authors)


@pytest.mark.parametrize(
    ("n", "share", "count"),
    [
        (45_000, "0.1", 4500),
        (65_937, "0.1", 6593),
        (65_937, "0.2", 13_186 + 1),
        (45_000, "0.5", 22_500),
        (100, "0.29", 29),
    ],
)
@pytest.mark.parametrize("authors", [True, False])
def test_random_sizes(n, share, count, authors):
    rows = forget_rows(f"random:{share}", pool(torch.arange(n) % 10), 2, authors)
    assert len(rows) == len(rows.unique()) == count
    assert torch.equal(rows, rows.sort().values)


def test_authors_random_rows():
    expected = np.random.RandomState(4 - 1).choice(np.arange(45_000), size=4500, replace=False)
    assert forget_rows("random:0.1", pool(torch.arange(45_000) % 10), 4, authors=True).tolist() == sorted(expected)


def test_authors_identities_of_seed_2():
    """Their list: numpy.random.seed(2), then numpy.random.choice over the 307 identities."""
    images = pool(torch.arange(307 * 4) % 307)
    rows = forget_rows("identities:30", images, 2, authors=True)
    assert images.labels[rows].unique().tolist() == sorted(SEED_2)
    assert len(rows) == 30 * 4
    assert splits._choice(307, 30, 2, authors=True).tolist() == SEED_2


def test_authors_seed_leak_is_mended():
    """With one seed for both, a tenth of the forget set was never trained on; with two, all of it was."""
    labels = torch.arange(50_000) % 10
    trained, _ = validation_split(labels, 2)
    other, _ = validation_split(labels, 3)
    theirs = other[forget_rows("random:0.1", pool(labels[other]), 3, authors=True)]
    assert 400 < (~torch.isin(theirs, trained)).sum() < 500
    ours = trained[forget_rows("random:0.1", pool(labels[trained]), 3)]
    assert torch.isin(ours, trained).all()


def test_each_example_is_as_likely():
    images = pool(torch.arange(50) % 5)
    hits = torch.zeros(50)
    for seed in range(400):
        hits[forget_rows("random:0.2", images, seed)] += 1
    assert hits.sum() == 400 * 10
    assert ((hits - 80) / (400 * 0.2 * 0.8) ** 0.5).abs().max() < 4.5


def test_a_class_is_all_of_it():
    images = pool(torch.tensor([3, 1, 3, 0, 3, 2]))
    assert forget_rows("class:3", images, 0).tolist() == [0, 2, 4]


def test_identities_depend_on_the_seed():
    images = pool(torch.arange(120) % 40)
    drawn = [tuple(images.labels[forget_rows("identities:10", images, seed)].unique().tolist()) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 10


def test_indices_are_ids_or_rows(tmp_path):
    images = pool(torch.arange(20) % 4)
    file = tmp_path / "forget.txt"
    file.write_text("part/7\n\n  3 \npart/19\n3\n")
    assert forget_rows(f"indices:{file}", images, 0).tolist() == [3, 7, 19]
    stored = images.take(forget_rows("random:0.3", images, 1)).ids
    file.write_text("\n".join(stored))
    assert images.take(forget_rows(f"indices:{file}", images, 0)).ids == stored


@pytest.mark.parametrize("line", ["part/20", "20", "-1", "1.5", "9" * 5000, "part"])
def test_indices_name_the_line_that_is_no_example(tmp_path, line):
    file = tmp_path / "forget.txt"
    file.write_text(f"part/1\n{line}\n")
    with pytest.raises(UserError, match=r"forget.txt, line 2: .* give an id, such as part/0, or a row from 0 to 19"):
        forget_rows(f"indices:{file}", pool(torch.arange(20) % 4), 0)


def test_a_byte_order_mark_is_no_part_of_the_indices(tmp_path):
    file = tmp_path / "forget.txt"
    file.write_text("part/7\n3\n", encoding="utf-8-sig")
    assert forget_rows(f"indices:{file}", pool(torch.arange(20) % 4), 0).tolist() == [3, 7]


def test_indices_need_a_text_file(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary", "."):
        with pytest.raises(UserError, match="cannot be read"):
            forget_rows(f"indices:{tmp_path / name}", pool(torch.arange(20)), 0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "is not understood: give random:0.1"),
        ("everything", "is not understood"),
        ("randomly:0.1", "is not understood"),
        *((f"random:{share}", "no share between 0 and 1") for share in ("", "0", "1", "-0.1", "nan", "inf", "ten")),
        ("random:1e999999999", "no share between 0 and 1"),
        ("random:0.001", "selects none of the 20"),
        ("class:4", "the classes are 0 to 3"),
        ("class:999999999", "the classes are 0 to 3"),
        *((f"class:{number}", "no whole number") for number in ("", "-1", "cat", "1.0", "9" * 5000)),
        *((f"identities:{number}", "there are 4: give 1 to 3") for number in (0, 4, 30)),
        ("identities:some", "no whole number"),
    ],
)
def test_bad_specs_are_named(spec, says):
    with pytest.raises(UserError, match=says):
        forget_rows(spec, pool(torch.arange(20) % 4), 0)


def test_something_is_retained(tmp_path):
    images = pool(torch.zeros(5, dtype=torch.int64))
    (tmp_path / "all.txt").write_text("\n".join(images.ids))
    for spec in ("class:0", f"indices:{tmp_path / 'all.txt'}"):
        with pytest.raises(UserError, match="selects all 5"):
            forget_rows(spec, images, 0)


def test_classes_forgotten_wholly_leave_the_test_set():
    pool_labels, test_labels = torch.arange(40) % 4, torch.arange(12) % 4
    of_class = (pool_labels == 2).nonzero()[:, 0]
    assert splits.test_rows(test_labels, pool_labels, of_class).tolist() == [r for r in range(12) if r % 4 != 2]
    assert splits.test_rows(test_labels, pool_labels, of_class[1:]).tolist() == list(range(12))
    assert splits.test_rows(test_labels, pool_labels, of_class[:0]).tolist() == list(range(12))


def test_the_docstrings_example_on_real_digits():
    data = load("digits")
    train, val = validation_split(data.train.labels, split_seed=1)
    images = data.train.take(train)
    forget = forget_rows("class:3", images, seed=2)
    test = splits.test_rows(data.test.labels, images.labels, forget)
    assert len(train) + len(val) == 1352
    assert (images.labels[forget] == 3).all()
    assert data.test.labels[test].unique().tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
