"""eval.layout: what the other projects' own scripts compute from the files is what eval.attack says."""

import json
from pathlib import Path

import pytest
from PIL import Image

from erase_sd.common.errors import UserError
from eval.images.sources import resolve
from eval.layout import main


def attacked(folder: Path, plain: list[bool], hits: dict[int, bool]) -> None:
    """Write results as eval.attack does: of the plain prompts, and of an attack on some of the rows."""
    place = folder / "results" / "attacked"
    place.mkdir(parents=True)
    for name, found in (("plain", dict(enumerate(plain))), ("tina", hits)):
        records = []
        for row, success in found.items():
            records.append({"row": row, "seed": row + 7, "prompt": f"p{row}", "success": success, "seconds": 3661.5})
        (place / f"{name}.json").write_text(json.dumps({"records": records}))


def logs(root: Path) -> list[list[dict]]:
    """Read a root as check_asr.py does, by the index in config.json."""
    found = []
    for place in root.iterdir():
        index = json.loads((place / "config.json").read_text())["attacker"]["attack_idx"]
        found.append((index, json.loads((place / "log.json").read_text())))
    return [log for _, log in sorted(found, key=lambda pair: pair[0])]


def test_check_asr_finds_the_same_rates(tmp_path: Path):
    attacked(tmp_path, [True, False, False, False], {0: False, 1: True, 2: False, 3: True})
    assert main([str(tmp_path), "--to", "unlearndiffatk"]) == 0
    root = tmp_path / "unlearndiffatk" / "attacked"
    attack, none = logs(root / "tina"), logs(root / "no_attack")
    before = sum(log[-1]["success"] for log in none)
    after = sum(log[-1]["success"] for log in attack) - sum(log[0]["success"] for log in attack)
    assert len(none) == 4
    assert before == 1
    assert after == 2


def test_times_are_as_their_script_parses_them(tmp_path: Path):
    attacked(tmp_path, [False], {0: True})
    main([str(tmp_path), "--to", "unlearndiffatk"])
    last = logs(tmp_path / "unlearndiffatk" / "attacked" / "tina")[0][-1]
    hours, minutes, seconds = last["relative_time"].split(":")
    assert int(hours) * 3600 + int(minutes) * 60 + float(seconds) == 2 * 3661.5


def test_unlearncanvas_names(drawn, tmp_path: Path):
    rows = resolve("unlearncanvas").rows
    assert len(rows) == 51 * 20
    assert {row.seed for row in rows} == {188}
    prompts = [rows[0].prompt, next(row.prompt for row in rows if "Van Gogh" in row.prompt)]
    folder = drawn("canvas", prompts)
    assert main([str(folder), "--to", "unlearncanvas", "--unlearned", "Van_Gogh", "--output_dir", str(tmp_path)]) == 0
    names = sorted(path.name for path in (tmp_path / "Van_Gogh").iterdir())
    assert names == ["Abstractionism_Architectures_seed7.jpg", "Van_Gogh_Architectures_seed8.jpg"]
    with Image.open(tmp_path / "Van_Gogh" / names[0]) as image:
        assert image.format == "JPEG"


def test_other_prompts_are_refused(drawn):
    with pytest.raises(UserError, match="not of --prompts unlearncanvas"):
        main([str(drawn("other", ["a cat"])), "--to", "unlearncanvas", "--unlearned", "Monet"])
