"""Prompt sources: either column naming of I2P, its oddities, filters, and one sentence for every broken file."""

from pathlib import Path

import pytest

from prompts import load
from prompts.tables import PromptRow, chosen, is_i2p, of_concept, read, read_file

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
        assert is_i2p(rows)
        assert rows[0].prompt == "a red cup"
        assert (rows[0].seed, rows[0].guidance) == (4290749014, 255.0)
    assert (hub[0].width, hub[0].height) == (512, 448)
    assert esd[0].tags["case_number"] == "0"


def test_oddities_stay_rows_in_their_place(tmp_path: Path):
    odd = ['"two\nlines",hate,0,0,1,7,512,512', '"",hate,0,0,2,7,512,512', "a/../b <b>,hate,0,0,3,7,512,512"]
    rows = read(table(tmp_path, HUB, *odd, "a cup,hate,0,0,4,7,512,512", "a cup,hate,0,0,4,7,512,512"))
    assert [row.row for row in rows] == [0, 1, 2, 3, 4]
    assert [row.prompt for row in rows] == ["two\nlines", "", "a/../b <b>", "a cup", "a cup"]


def test_seeds_are_exact_beyond_what_a_float_holds(tmp_path: Path):
    assert read(table(tmp_path, "prompt,seed", "a cup,9007199254740993"))[0].seed == 2**53 + 1


def test_coco_and_plain_text(tmp_path: Path):
    coco = read(table(tmp_path, "image_id,prompt,evaluation_seed", "000123,a boat at sea,7"))
    assert coco[0].seed == 7
    assert coco[0].tags == {"image_id": "000123"}
    assert not is_i2p(coco)
    text = read(table(tmp_path, "a cup", "", " a chair ", name="p.txt"))
    assert [(row.row, row.prompt, row.seed) for row in text] == [(0, "a cup", None), (2, "a chair", None)]


def test_the_paper_s_prompts_have_the_paper_s_seeds():
    rows = of_concept(load("nudity"))
    assert [row.seed for row in rows] == [4889, 4782, 4068, 4373]
    assert [row.prompt for row in of_concept(load("cat"))] == [example.prompt for example in load("cat").examples]


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
        (["case_number,source,prompt", "3,coco-30k,a", "3,coco-30k,b"], "row 1: case_number 3 is that of row 0 too"),
        (["case_number,image_id,prompt", "3,1,a", "3,1,b"], "row 1: case_number 3 is that of row 0 too"),
        ([ESD, "0,3,a,hate,0,0,1,7", "1,3,b,hate,0,0,2,7"], "row 1: case_number 3 is that of row 0 too"),
        (["prompt,seed", "a cup,188.5"], "row 0: seed 188.5 is no whole number"),
        (["prompt,seed", "a cup,1.7"], "row 0: seed 1.7 is no whole number"),
        (["prompt,seed", "a cup,9007199254740993.5"], "row 0: seed 9007199254740993.5 is no whole number"),
        (["prompt,seed", "a cup,1e999999999"], "row 0: seed '1e999999999' is no number"),
        (["prompt,width", "a cup,64.5"], "row 0: width 64.5 is no whole number"),
        (
            ["prompt,seed", "a cup,1", "a tall, thin cup,2"],
            "row 1: it has more cells than the header: quote the prompt",
        ),
        (["prompt,seed", "a cup,1", '"a "tall" cup",2'], "row 1: mend the quotes: quote the prompt"),
        (["prompt,seed", "a\rcup,1"], "row 0: a carriage return stands alone in it"),
        (["prompt", "a cup", "a \0 cup"], "line 3 holds a NUL byte"),
        (["version https://git-lfs.github.com/spec/v1", "oid sha256:00", "size 5"], "git lfs pull"),
        (
            ["target_prompt,adv_prompt", "a,b"],
            "only target_prompt, adv_prompt: say which one holds the prompts with --pro",
        ),
        (["English,French,Index", "a cup,une tasse,0"], "only English, French, Index: say which one"),
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
    (tmp_path / "mac.txt").write_bytes(b"a cup\ra chair\r")
    with pytest.raises(ValueError, match="carriage returns alone"):
        read(tmp_path / "mac.txt")
    with pytest.raises(ValueError, match="git lfs pull"):
        read(table(tmp_path, "version https://git-lfs.github.com/spec/v1", "oid sha256:00", name="p.txt"))


HELD = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_only(tmp_path: Path, end: str):
    odd = f"a{HELD}cup{HELD}"
    for name, lines in (("rows.csv", ["prompt,seed", f"{odd},1", "a chair,2"]), ("p.txt", [odd, "a chair"])):
        path = tmp_path / name
        path.write_bytes((end.join(lines) + end).encode())
        assert [row.prompt for row in read(path)] == [odd, "a chair"]


@pytest.mark.parametrize(
    "lines",
    [
        ["zorp plinth", "vex fern"],
        ['zorp "plinth', "vex fern"],
        ['"zorp plinth', "vex fern"],
        ["zorp plinth, vex", "fern, moss"],
        ["zorp plinth,1", "vex fern,2"],
        ["a wall with many letters and a text,zorp", "b,1"],
    ],
)
@pytest.mark.parametrize("column", [None, "sentence"])
def test_a_first_line_that_may_be_a_prompt_is_not_shown(tmp_path: Path, lines: list[str], column: str | None):
    with pytest.raises(ValueError, match="has no header: name it .txt, one prompt a line") as error:
        read_file(table(tmp_path, *lines), column)
    assert "zorp" not in str(error.value)
    assert "--prompt_column" in str(error.value)


@pytest.mark.parametrize(
    ("header", "column", "prompt"),
    [
        ("harsh prompt,normal prompt", "harsh prompt", "one"),
        ("target_prompt,adv_prompt", "adv_prompt", "two"),
        ("English,French", "french", "two"),
        ("prompt,adv_prompt", "adv_prompt", "two"),
    ],
)
def test_a_column_can_be_named(tmp_path: Path, header: str, column: str, prompt: str):
    found = read_file(table(tmp_path, header, "one,two"), column)
    assert [row.prompt for row in found.rows] == [prompt]
    assert len(found.rows[0].tags) == 1
    assert found.notices == ()


def test_a_column_that_is_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match="--prompt_column 'advice' is no column of .*, which has prompt, seed"):
        read_file(table(tmp_path, "prompt,seed", "a cup,1"), "advice")
    with pytest.raises(ValueError, match="--prompt_column 'prompt' is for a .csv"):
        read_file(table(tmp_path, "a cup", name="p.txt"), "prompt")


@pytest.mark.parametrize(
    ("header", "notice"),
    [
        ("prompt,adv_prompt", "the prompt is that of column prompt, and adv_prompt is there too"),
        ("prompt1,prompt", "the prompt is that of column prompt, and prompt1 is there too"),
        ("text,caption", "the prompt is that of column caption, and text is there too"),
        ("prompt,prompt", "the prompt is that of column prompt, and prompt is there too"),
        ("prompt,prompt_toxicity", None),
        ("prompt,context", None),
    ],
)
def test_a_second_column_of_prompts_is_told(tmp_path: Path, header: str, notice: str | None):
    notices = read_file(table(tmp_path, header, "1,1")).notices
    assert len(notices) == (notice is not None)
    assert notice is None or notice in notices[0]


def test_the_first_of_two_seeds_is_read_and_the_other_told(tmp_path: Path):
    found = read_file(table(tmp_path, "prompt,seed,seed", "a cup,1,2"))
    assert found.rows[0].seed == 1
    assert "the seed is that of column seed, and seed is there too" in found.notices[0]


def test_case_numbers_may_repeat_with_one_notice(tmp_path: Path):
    found = read_file(table(tmp_path, "prompt,case_number", "a,3", "b,3", "c,3", "d,", "e,"))
    assert [row.row for row in found.rows] == [0, 1, 2, 3, 4]
    assert len(found.notices) == 1
    assert "row 1: case_number 3 is that of row 0 too (2 rows repeat one)" in found.notices[0]


def test_what_pandas_writes(tmp_path: Path):
    rows = read(table(tmp_path, ",prompt,seed,width", "0,a cup,188.0,64.0", "1,a chair,,", '2,"",1e3,'))
    assert rows == [
        PromptRow(row=0, prompt="a cup", seed=188, width=64),
        PromptRow(row=1, prompt="a chair"),
        PromptRow(row=2, prompt="", seed=1000),
    ]
    assert [type(row.seed) for row in rows] == [int, type(None), int]


def test_a_header_with_spaces_and_capitals_keeps_its_columns(tmp_path: Path):
    rows = read(table(tmp_path, "Prompt, seed, guidance", '"a tall, thin cup", 7, 2.5', 'a chair, "8", 3'))
    assert rows == [
        PromptRow(row=0, prompt="a tall, thin cup", seed=7, guidance=2.5),
        PromptRow(row=1, prompt="a chair", seed=8, guidance=3.0),
    ]
