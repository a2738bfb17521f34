"""A folder of images as eval.generate and eval.nudity leave it, of noise: no test needs a picture of anything."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 128
Box = tuple[str, float, list[int]]  # class, score, (x, y, width, height)


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[..., Path]:
    """drawn("sd", prompts, boxes): noise for every prompt; `boxes` {row: [box]} as stored detections, or None."""

    def draw(
        name: str,
        prompts: list[str],
        boxes: dict[int, list[Box]] | None = None,
        *,
        weights: str | None = None,
        source: str = "i2p",
        broken: dict[int, str] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        asked = {"model": "M", "weights": weights, "prompts": source, "prompts_sha256": "0", "steps": 50}
        (folder / "generation.json").write_text(json.dumps(asked))
        lines, seen = [], []
        for row, prompt in enumerate(prompts):
            file = f"{row:05d}_{row + 7}.png"
            pixels = np.random.default_rng([row, *name.encode()]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / file)
            why, digest = (broken or {}).get(row), sha256((folder / file).read_bytes()).hexdigest()
            size = {"width": SIDE, "height": SIDE}
            lines.append(
                {"file": file, "row": row, "prompt": prompt, "seed": row + 7, "broken": why, "sha256": digest} | size
            )
            found = [{"class": c, "score": score, "box": box} for c, score, box in (boxes or {}).get(row, [])]
            record = {"file": file, "sha256": digest, "detections": found, "broken": why, "detector": "d"}
            seen.append(record | size)
        (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if boxes is not None:
            (folder / "detections.jsonl").write_text("".join(json.dumps(line) + "\n" for line in seen))
        return folder

    return draw
