"""Who looks at attacked pictures, and what they are asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erase_sd.common.errors import UserError
from erase_sd.pocket.world import Scene, caption
from eval.attacks.asked import called, of_concept, of_pocket
from eval.attacks.base import AttackedConcept
from eval.attacks.judges import class_vector, first_is_nearest, judge, whole_only
from tests.eval.attacks.conftest import CONCEPT


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_a_broken_picture_shows_nothing_and_is_not_asked_about():
    asked = []

    def everything(images: list[Image.Image]) -> list[bool]:
        asked.append(len(images))
        return [True for _ in images]

    images = [noise(0), Image.new("RGB", (32, 32)), noise(1), Image.new("RGB", (32, 32), (90, 90, 90))]
    assert whole_only(everything)(images) == [True, False, True, False]
    assert asked == [2]
    assert whole_only(everything)(images[1:2]) == [False]


def test_the_nearest_of_all_classes_is_found_by_brute_force():
    torch.manual_seed(0)
    features = torch.randn(30, 8)
    classes = torch.stack([class_vector(torch.randn(3, 8)) for _ in range(4)])
    found = first_is_nearest(features, classes).tolist()
    for row, first in zip(features, found, strict=True):
        cosines = [float(torch.cosine_similarity(row, other, dim=0)) for other in classes]
        assert first == (max(cosines) == cosines[0])
    assert 0 < sum(found) < 30


def test_sentences_count_alike_in_a_class_whatever_their_length():
    texts = torch.tensor([[100.0, 0.0], [0.0, 0.1]])
    torch.testing.assert_close(class_vector(texts), torch.tensor([0.5, 0.5]).sqrt())


def test_the_pocket_oracle_answers_for_one_word():
    cat = AttackedConcept(name="cat", kind="object", words=("cat",), pairs=())
    dog = AttackedConcept(name="dog", kind="object", words=("dog",), pairs=())
    assert judge("pocket", cat).key != judge("pocket", dog).key
    assert judge("pocket", cat).shows([noise(0)]) == [False]


@pytest.mark.parametrize("name", ["oracle", "clip", "clip:", "nudenet:mine", "nudenet:rece"])
def test_an_unknown_judge_is_named(name: str):
    with pytest.raises(UserError, match=f"--judge {name}"):
        judge(name, CONCEPT)


def test_a_clip_judge_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=f"clip:{tmp_path}/none cannot be loaded"):
        judge(f"clip:{tmp_path}/none", CONCEPT)


def test_what_the_pocket_model_does_not_draw_is_refused():
    with pytest.raises(UserError, match="no concept 'zebra'"):
        of_pocket("zebra", 4, 0)


@pytest.mark.parametrize("text", ["watermelon", "neon style", "pink background"])
def test_targets_of_the_pocket_world_ask_for_the_concept(text: str):
    asked = of_pocket(text, 70, 0)
    word = text.split()[0]
    assert len(asked.targets) == 70
    assert len({(t.prompt, t.seed) for t in asked.targets}) == 70
    for target in asked.targets:
        assert word in target.prompt
        assert target.seed < 1_000_000  # which no training draws
    for positive, negative in asked.concept.pairs:
        assert word in positive
        assert word not in negative
    assert asked.concept.company not in caption(Scene(asked.concept.words[0], None, None))


def test_targets_of_a_concept_file_go_round_its_prompts():
    asked = of_concept("nudity", None, 10, 0)
    assert asked.explicit
    assert len({(t.prompt, t.seed) for t in asked.targets}) == 10
    assert [t.row for t in asked.targets] == list(range(10))
    prompts = [t.prompt for t in asked.targets]
    n = len(set(prompts))
    assert prompts[:n] == prompts[n : 2 * n]
    assert asked.sha256 == of_concept("nudity", None, 10, 0).sha256
    assert asked.sha256 != of_concept("nudity", None, 9, 0).sha256


def test_a_file_of_prompts_is_taken_row_by_row(tmp_path: Path):
    file = tmp_path / "zoo.csv"
    file.write_text("prompt,seed\na cat on a roof,5\na cat in a box,6\n")
    asked = of_concept("cat", str(file), None, 0)
    assert [(t.prompt, t.seed) for t in asked.targets] == [("a cat on a roof", 5), ("a cat in a box", 6)]
    assert asked.source == "zoo"
    assert not asked.explicit


def test_other_names_of_a_concept_come_with_it():
    assert called(of_concept("cat", None, 2, 0), ("kitten",)).concept.wordings == ("kitten",)
