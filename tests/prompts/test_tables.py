"""Prompt sources: either column naming of I2P, its oddities, filters, and one sentence for every broken file."""

from pathlib import Path

import pytest

from prompts import load
from prompts.tables import chosen, is_i2p, of_concept, read

HUB = "prompt,categories,hard,nudity_percentage,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height"
ESD = ",case_number,prompt,categories,hard,nudity_percentage,evaluation_seed,evaluation_guidance"


def table(tmp_path: Path, *lines: str, name: str = "rows.csv") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_namings_of_i2p_say_the_same(tmp_path: Path):
    hub = read(table(tmp_path, HUB, 'a red cup,"hate, violence",1,10.0,4290749014,255,512,448'))
    esd = read(table(tmp_path, ESD, '0,0,a red cup,"hate, violence",1,10.0,4290749014,255'))
    for rows in (hub, esd):
        assert is_i2p(rows) and rows[0].prompt == "a red cup"
        assert (rows[0].seed, rows[0].guidance) == (4290749014, 255.0)
    assert (hub[0].width, hub[0].height) == (512, 448) and esd[0].tags["case_number"] == "0"


def test_oddities_stay_rows_in_their_place(tmp_path: Path):
    odd = ['"two\nlines",hate,0,0,1,7,512,512', '"",hate,0,0,2,7,512,512', "a/../b <b>,hate,0,0,3,7,512,512"]
    rows = read(table(tmp_path, HUB, *odd, "a cup,hate,0,0,4,7,512,512", "a cup,hate,0,0,4,7,512,512"))
    assert [row.row for row in rows] == [0, 1, 2, 3, 4]
    assert [row.prompt for row in rows] == ["two\nlines", "", "a/../b <b>", "a cup", "a cup"]


def test_seeds_are_exact_beyond_what_a_float_holds(tmp_path: Path):
    assert read(table(tmp_path, "prompt,seed", "a cup,9007199254740993"))[0].seed == 2**53 + 1


def test_coco_and_plain_text(tmp_path: Path):
    coco = read(table(tmp_path, "image_id,prompt,evaluation_seed", "000123,a boat at sea,7"))
    assert coco[0].seed == 7 and coco[0].tags == {"image_id": "000123"} and not is_i2p(coco)
    text = read(table(tmp_path, "a cup", "", " a chair ", name="p.txt"))
    assert [(row.row, row.prompt, row.seed) for row in text] == [(0, "a cup", None), (2, "a chair", None)]


def test_the_paper_s_prompts_have_the_paper_s_seeds():
    rows = of_concept(load("nudity"))
    assert [row.seed for row in rows] == [4889, 4782, 4068, 4373]
    assert [row.prompt for row in rows] == [example.prompt for example in load("nudity").examples]


def test_filters(tmp_path: Path):
    lines = ['a,"hate, violence",1,50.0,1,7,512,512', "b,sexual,0,50.1,2,7,512,512", "c,sexual,1,0,3,7,512,512"]
    rows = read(table(tmp_path, HUB, *lines))

    def names(**filters: object) -> list[str]:
        return [row.prompt for row in chosen(rows, "i2p", **filters)]

    assert names() == ["a", "b", "c"]
    assert names(category="violence") == ["a"]
    assert names(nudity_above=50) == ["b"]
    assert names(hard=True) == ["a", "c"]
    assert names(category="sexual", hard=True) == ["c"]
    with pytest.raises(ValueError, match="'sexuall' is none of hate, sexual, violence"):
        names(category="sexuall")
    with pytest.raises(ValueError, match="no row of i2p is left"):
        names(nudity_above=99)


def test_only_i2p_can_be_filtered(tmp_path: Path):
    with pytest.raises(ValueError, match="only I2P can be filtered"):
        chosen(read(table(tmp_path, "prompt", "a cup")), "mine", hard=True)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["words,seed", "a cup,1"], "no column prompt, caption or text, only words, seed"),
        (["prompt,seed", "a cup,-1"], "row 0: seed '-1' is no number from 0"),
        (["prompt,seed", "a cup,1", "a cup,x"], "row 1: seed 'x' is no number"),
        (["prompt,guidance", "a cup,1e9"], "row 0: guidance '1e9' is no number from 0 to 1000"),
        (["prompt,guidance", "a cup,nan"], "row 0: guidance 'nan' is no number"),
        (["prompt,seed", "a cup"], "row 0: it has fewer cells than the header"),
        (["prompt,seed", "a, cup,1"], "row 0: it has more cells than the header"),
        (["case_number,prompt", "3,a", "3,b"], "row 1: case_number 3 is that of row 0 too"),
        (["prompt"], "holds no prompts"),
        (["prompt", '"a cup'], "mend the quotes"),
    ],
)
def test_broken_tables_cost_one_sentence(tmp_path: Path, lines: list[str], sentence: str):
    with pytest.raises(ValueError, match="rows.csv") as error:
        read(table(tmp_path, *lines))
    assert sentence in str(error.value)


def test_missing_and_unreadable_files(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"prompt\ncaf\xe9\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read(tmp_path / "latin.csv")
