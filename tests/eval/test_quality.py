"""eval.quality on small folders: features against transformers' own, what is cached, what is refused."""

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from erase_sd.common.errors import UserError
from eval.features import cache as features
from eval.features import extractors
from eval.features.distances import Statistics, cosines, frechet, statistics
from eval.features.metrics import titled
from eval.images.folder import read
from eval.quality import Quality, judge, main

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red cup", "a boat, at sea", "a tree", "a shoe", "a cup", "two shoes", "a tree", "a sea"]


def folder_of(path: Path, seed: int, prompts: list[str] | None = PROMPTS, size: tuple[int, int] = (40, 40)) -> Path:
    """Smooth random pictures, with a manifest when there are prompts."""
    path.mkdir()
    rng, lines = np.random.default_rng(seed), []
    for row, prompt in enumerate(prompts or PROMPTS):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        file = f"{row:05d}_{row + 7}.png"
        coarse.resize(size, Image.Resampling.BICUBIC).save(path / file)
        lines.append(json.dumps({"file": file, "row": row, "prompt": prompt, "seed": row + 7}) + "\n")
    if prompts:
        (path / "manifest.jsonl").write_text("".join(lines))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "erased", 0)


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "original", 1)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, tiny_sd: Path) -> Path:
    """A CLIP of random weights as transformers saves it: model, tokenizer, image processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=sides | ids | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config=sides | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-dinov2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, mlp_ratio=2
        )
        Dinov2Model(config).save_pretrained(folder)
    numbers = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers | {"crop_size": 32, "resample": 3}))
    return folder


class Means(torch.nn.Module):
    """Bytes -> 6 numbers, and other ones unless `return_features` is passed, as StyleGAN's Inception does it."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = x.float()
        kept = torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)
        return kept if return_features else kept * 0


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("models") / "means.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Means()).save(str(file))
    return file


def written(folder: Path) -> dict[str, dict]:
    return {entry["name"]: entry for entry in json.loads((folder / "quality.json").read_text())["metrics"]}


@pytest.mark.parametrize("size", [(40, 40), (61, 47), (33, 90), (20, 20)])
def test_preprocessing_is_transformers_own(clip_folder: Path, tmp_path: Path, size: tuple[int, int]):
    image = Image.open(folder_of(tmp_path / "x", 3, ["a"], size) / "00000_7.png").convert("RGB")
    theirs = CLIPImageProcessorPil.from_pretrained(clip_folder)(image, return_tensors="pt").pixel_values[0]
    ours = extractors.load(f"clip:{clip_folder}").prepare(image)
    assert ours.shape == (3, 32, 32)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_clip_score_is_transformers_cosine(images: Path, clip_folder: Path):
    assert judge(Quality(folder=(str(images),), features=f"clip:{clip_folder}", metrics=("clip",), batch_size=3)) == 0
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    pictures = [Image.open(images / e.file) for e in read(images).entries]
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokenizer(PROMPTS, padding=True, return_tensors="pt"))
    theirs = 100 * (out.image_embeds * out.text_embeds).sum(1)
    entry = written(images)["clip"]
    assert entry["values"] == pytest.approx(theirs.tolist(), abs=1e-3)
    assert entry["n"] == len(PROMPTS)
    assert entry["value"] == pytest.approx(theirs.mean().item(), abs=1e-3)
    assert entry["higher_is_better"] is True


def test_every_metric_between_two_folders(images: Path, originals: Path, clip_folder: Path):
    assert main([str(images), "--baseline", str(originals), "--features", f"clip:{clip_folder}"]) == 0
    found = written(images)
    assert list(found) == ["fid", "kid", "cmmd", "clip", "drift", "drift_rmse"]
    for name, entry in found.items():
        least = {"name", "title", "value", "unit", "higher_is_better", "n", "features", "against", "protocol"}
        assert least <= entry.keys() <= least | {"values"}, name
        assert np.isfinite(entry["value"]), name
        assert entry["against"] == (None if name == "clip" else str(originals))
    assert found["fid"]["n"] == [8, 8]
    assert found["fid"]["value"] > 0
    assert found["cmmd"]["value"] > 0
    a, b = (np.stack([np.asarray(Image.open(p), float) for p in sorted(f.glob("*.png"))]) for f in (images, originals))
    rmse = np.sqrt(((a - b) ** 2).mean((1, 2, 3)))
    assert found["drift_rmse"]["values"] == pytest.approx(rmse.tolist(), rel=1e-9)


def test_a_folder_against_itself_is_at_zero(images: Path, dino_folder: Path, capsys: pytest.CaptureFixture):
    main([str(images), "--baseline", str(images), "--features", f"dinov2:{dino_folder}"])
    found = written(images)
    assert "clip" not in found
    assert "cmmd" not in found  # they are CLIP's; the others were chosen by themselves
    assert "without cmmd, clip: defined on CLIP" in capsys.readouterr().err
    for name in ("fid", "drift", "drift_rmse"):
        assert found[name]["value"] == pytest.approx(0, abs=1e-6)
    assert found["kid"]["value"] < 1e-9


def test_dinov2_features_are_the_class_token(images: Path, dino_folder: Path):
    extractor = extractors.load(f"dinov2:{dino_folder}")
    ours = features.of_folder(read(images), extractor, 8)
    x = torch.stack([extractor.prepare(Image.open(images / e.file)) for e in ours.sound])
    with torch.no_grad():
        hidden = Dinov2Model.from_pretrained(dino_folder).eval()(x).last_hidden_state
    assert torch.allclose(ours.values, hidden[:, 0], atol=1e-5)


def test_torchscript_gets_bytes_and_is_asked_for_features(images: Path, script: Path):
    ours = features.of_folder(read(images), extractors.load(f"torchscript:{script}"), 3)
    pixels = np.stack([np.asarray(Image.open(images / e.file), np.float32) for e in ours.sound])
    assert np.allclose(ours.values[:, :3].numpy(), pixels.mean((1, 2)), atol=1e-3)


def test_pictures_of_many_sizes_are_one_folder(tmp_path: Path, script: Path):
    folder = folder_of(tmp_path / "x", 0, None)
    Image.open(folder / "00002_9.png").resize((50, 30)).save(folder / "00002_9.png")
    assert features.of_folder(read(folder), extractors.load(f"torchscript:{script}"), 4).values.shape == (8, 6)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "pocket"])
def test_the_batch_size_changes_nothing(images: Path, clip_folder: Path, dino_folder: Path, kind: str):
    name = {"clip": f"clip:{clip_folder}", "dinov2": f"dinov2:{dino_folder}", "pocket": "pocket"}[kind]
    sides = []
    for size in (1, 3, 8):
        shutil.rmtree(images / ".cache", ignore_errors=True)
        sides.append(features.of_folder(read(images), extractors.load(name), size).values)
    for values in sides[1:]:
        assert torch.allclose(values, sides[0], atol=1e-5)
        assert frechet(statistics(values), statistics(sides[0])) == pytest.approx(0, abs=1e-4)


def test_pocket_features_are_what_the_heads_see(images: Path):
    from erase_sd.pocket.oracle import load, to_tensor

    ours = features.of_folder(read(images), extractors.load("pocket"), 4)
    oracle = load()
    pictures = to_tensor([Image.open(images / e.file) for e in ours.sound])
    assert torch.allclose(oracle.heads["object"](ours.values), oracle(pictures)["object"], atol=1e-4)


def test_nothing_is_computed_twice_and_changed_images_are(images: Path, monkeypatch: pytest.MonkeyPatch):
    extractor, calls = extractors.load("pocket"), []
    counted = replace(extractor, images=lambda x: calls.append(len(x)) or extractor.images(x))
    first = features.of_folder(read(images), counted, 8)
    again = features.of_folder(read(images), counted, 8)
    assert calls == [8]
    assert torch.equal(first.values, again.values)
    Image.open(images / "00001_8.png").rotate(90).save(images / "00001_8.png")
    changed = features.of_folder(read(images), counted, 8)
    assert calls == [8, 8]
    assert not torch.equal(first.values[1], changed.values[1])
    assert torch.equal(first.values[2], changed.values[2])
    features.of_folder(read(images), replace(counted, key="another"), 8)
    assert calls == [8, 8, 8]


def test_statistics_stand_for_their_folder(images: Path, originals: Path, tmp_path: Path):
    file = tmp_path / "original.safetensors"
    assert main([str(originals), "--save_statistics", str(file), "--features", "pocket"]) == 0
    main([str(images), "--baseline", str(originals), "--features", "pocket", "--metrics", "fid"])
    direct = written(images)["fid"]
    main([str(images), "--statistics", str(file), "--features", "pocket"])
    entries = json.loads((images / "quality.json").read_text())["metrics"]
    assert [e["against"] for e in entries] == [str(originals), str(file)]  # the first is still true, and kept
    assert entries[1]["value"] == pytest.approx(direct["value"], rel=1e-9)
    assert entries[1]["n"] == [8, 8]


def test_metrics_of_images_that_changed_are_dropped(images: Path, originals: Path, clip_folder: Path):
    main([str(images), "--features", f"clip:{clip_folder}"])
    main([str(images), "--baseline", str(originals), "--features", "pocket", "--metrics", "fid"])
    assert list(written(images)) == ["clip", "fid"]
    Image.open(images / "00001_8.png").rotate(90).save(images / "00001_8.png")
    main([str(images), "--baseline", str(originals), "--features", "pocket", "--metrics", "fid"])
    assert list(written(images)) == ["fid"]


def test_broken_images_are_counted_and_left_out(images: Path, originals: Path, capsys: pytest.CaptureFixture):
    (images / "00003_10.png").write_bytes(b"\x89PNG\r\n\x1a\ngarbage")
    Image.new("RGB", (40, 40)).save(originals / "00004_11.png")
    assert main([str(images), "--baseline", str(originals), "--features", "pocket"]) == 1
    result, found = json.loads((images / "quality.json").read_text()), written(images)
    assert (result["n"], result["broken"]) == (8, 1)
    assert found["fid"]["n"] == [7, 7]
    assert found["drift"]["n"] == 6
    assert "00003_10.png" in capsys.readouterr().err
    assert main([str(images), "--baseline", str(originals), "--features", "pocket"]) == 1  # from the cache as well


def test_drift_pairs_by_row_and_seed(images: Path, originals: Path):
    manifest = (originals / "manifest.jsonl").read_text().splitlines(keepends=True)
    (originals / "manifest.jsonl").write_text("".join(reversed(manifest[1:])))
    main([str(images), "--baseline", str(originals), "--features", "pocket", "--metrics", "drift"])
    entry = written(images)["drift"]
    assert entry["n"] == 7
    assert entry["protocol"]["files"] == [e.file for e in read(images).entries][1:]
    a, b = (features.of_folder(read(f), extractors.load("pocket"), 8).values for f in (images, originals))
    assert entry["values"] == pytest.approx((1 - cosines(a[1:], b.flip(0))).tolist())


def test_drift_pairs_nothing_that_was_not_asked_for_alike(images: Path, tmp_path: Path):
    others = folder_of(tmp_path / "others", 1, prompts=["a frog"] * len(PROMPTS))
    with pytest.raises(UserError, match="have other prompts for one row and seed"):
        main([str(images), "--baseline", str(others), "--features", "pocket", "--metrics", "drift"])
    lines = (images / "manifest.jsonl").read_text().splitlines(keepends=True)
    (images / "manifest.jsonl").write_text("".join(lines) + lines[0].replace("00000_7.png", "00001_8.png"))
    with pytest.raises(UserError, match="two images of row 0 and seed 7"):
        main([str(images), "--baseline", str(others), "--features", "pocket", "--metrics", "drift"])


def test_a_killed_run_keeps_the_chunks_that_are_done(images: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features, "CHUNK", 3)
    whole = features.of_folder(read(images), extractors.load("pocket"), 8).values
    for file in list((images / ".cache").glob("features-*"))[1:]:
        file.unlink()
    seen, computed = [], features._computed
    monkeypatch.setattr(features, "_computed", lambda *words: seen.append(words[1]) or computed(*words))
    assert torch.equal(features.of_folder(read(images), extractors.load("pocket"), 8).values, whole)
    assert 0 < sum(map(len, seen)) < len(PROMPTS)


def one_image(folder: Path) -> None:
    for file in sorted(folder.glob("*.png"))[1:]:
        file.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["{empty}"], "holds no images"),
        (["{images}"], "give --baseline, --statistics or CLIP features"),
        (["{images}", "--metrics", "fid"], "fid of .* cannot be computed: give --baseline"),
        (["{images}", "--metrics", "clip"], "defined on CLIP"),
        (["{images}", "--metrics", "cmmd", "--baseline", "{images}"], "defined on CLIP"),
        (["{images}", "--metrics", "drift", "--baseline", "{plain}"], "rows and seeds are unknown"),
        (["{images}", "--metrics", "drift", "--baseline", "{large}"], "40 x 40 pixels and .* 48 x 40"),
        (["{plain}", "--metrics", "clip", "--features", "{clip}"], "its images have no prompts"),
        (["{images}", "--metrics", "kid", "--statistics", "x"], "enough for FID"),
        (["{images}", "--statistics", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["{images}", "--statistics", "{other}"], "was made of other features"),
        (["{images}", "--statistics", "{foreign}"], "holds no statistics"),
        (["{images}", "--statistics", "x", "--baseline", "y"], "give one of them"),
        (["{images}", "{plain}", "--save_statistics", "x"], "is for one folder"),
        (["{images}", "--baseline", "{ruined}"], "of 8 images of .* only 1 can be used"),
        (["{images}", "--baseline", "{plain}", "--features", "vgg"], "none of clip:ID_OR_FOLDER"),
        (["{images}", "--baseline", "{plain}", "--features", "torchscript:no.pt"], "there is no file no.pt"),
        (["{images}", "--baseline", "{plain}", "--features", "torchscript:{foreign}"], "cannot be loaded"),
        (["{images}", "--baseline", "{plain}", "--features", "dinov2:{empty}"], "says nothing of image_mean"),
        (["{images}", "--baseline", "{plain}", "--features", "clip:nobody/nothing"], "cannot be loaded"),
    ],
)
def test_what_cannot_be_measured_says_why(tmp_path: Path, clip_folder: Path, script: Path, words, sentence: str):
    places = {"images": folder_of(tmp_path / "images", 0), "plain": folder_of(tmp_path / "plain", 1, None)}
    places |= {"large": folder_of(tmp_path / "large", 2, size=(48, 40)), "empty": tmp_path / "empty"}
    places |= {"ruined": folder_of(tmp_path / "ruined", 3), "clip": f"clip:{clip_folder}"}
    places |= {"other": tmp_path / "other.safetensors", "foreign": tmp_path / "foreign.safetensors"}
    places["empty"].mkdir()
    one_image(places["ruined"])
    save_file({"x": torch.zeros(1)}, places["foreign"])
    main([str(places["plain"]), "--save_statistics", str(places["other"]), "--features", f"torchscript:{script}"])
    given = [word.format(**places) for word in words]
    with pytest.raises(UserError, match=sentence):
        main(given if "--features" in given else [*given, "--features", "pocket"])
    assert not (places["images"] / "quality.json").exists()


def test_nan_features_and_partial_weights_are_refused(images: Path, clip_folder: Path, tmp_path: Path):
    model = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    weights = load_file(model / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinite features of .*00000_7.png"):
        main([str(images), "--features", f"clip:{model}"])
    del weights["visual_projection.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="has no value for visual_projection.weight"):
        main([str(images), "--features", f"clip:{model}"])


def test_a_clip_without_its_tokenizer_is_refused(images: Path, clip_folder: Path, tmp_path: Path):
    model = Path(shutil.copytree(clip_folder, tmp_path / "clip", ignore=shutil.ignore_patterns("*token*", "*.txt")))
    with pytest.raises(UserError, match="copy the tokenizer's files"):
        main([str(images), "--features", f"clip:{model}"])


def test_help_loads_no_slow_library_and_a_mistake_is_one_sentence(images: Path):
    code = (
        "import sys, eval.quality as q\ntry: q.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'diffusers', 'matplotlib', 'transformers'} & set(sys.modules), 'slow'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    command = [sys.executable, "-m", "eval.quality", str(images), "--features", "pocket"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: no metric of")


def test_published_statistics_are_read_and_said_to_be_unchecked(images: Path, script: Path, tmp_path: Path, capsys):
    rng = np.random.default_rng(0)
    theirs = rng.normal(100, 30, (50, 6))
    sigma = np.cov(theirs, rowvar=False)
    np.savez(tmp_path / "coco.npz", mu=theirs.mean(0), sigma=sigma)
    assert main([str(images), "--statistics", str(tmp_path / "coco.npz"), "--features", f"torchscript:{script}"]) == 0
    found = written(images)["fid"]
    mine = []
    for file in sorted(images.glob("*.png")):
        pixels = np.asarray(Image.open(file).convert("RGB"), float).reshape(-1, 3)
        mine.append([*pixels.mean(0), *pixels.std(0, ddof=1)])
    a = statistics(torch.tensor(np.array(mine)))
    b = (torch.from_numpy(theirs.mean(0)), torch.from_numpy(sigma), None)
    assert found["value"] == pytest.approx(frechet(a, Statistics(*b)), rel=1e-4)
    assert found["n"] == [8, None]
    assert found["title"] == "FID"
    assert "caution: published, of features and images that are not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"mu": np.zeros(6)}, "lacks mu or sigma"),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, "mu has 6 numbers and sigma is 5 x 5"),
        (None, "is no .npz of numbers"),
    ],
)
def test_statistics_that_are_none_are_named(images: Path, script: Path, tmp_path: Path, content, sentence: str):
    file = tmp_path / "x.npz"
    if content is None:
        file.write_text("no numbers")
    else:
        np.savez(file, **content)
    with pytest.raises(UserError, match=sentence):
        main([str(images), "--statistics", str(file), "--features", f"torchscript:{script}"])


def test_few_images_are_said_to_be_few_on_the_screen(images: Path, originals: Path, capsys: pytest.CaptureFixture):
    main([str(images), "--baseline", str(originals), "--features", "pocket", "--metrics", "fid"])
    printed = capsys.readouterr().out
    assert "FD-pocket" in printed
    assert "caution: 8 images span fewer than the" in printed


def test_fid_is_the_name_of_inceptions_distance_alone():
    assert titled("fid", "clip:openai/clip-vit-base-patch32") == "FD-CLIP"
    assert titled("kid", "dinov2:x") == "KD-DINOv2"
    assert titled("fid", "torchscript:inception-2015-12-05.pt") == "FID"


def test_a_network_that_takes_no_bytes_is_one_sentence(images: Path, originals: Path, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(torch.nn.Conv2d(3, 4, 3)).save(str(tmp_path / "float.pt"))
    words = ["--baseline", str(originals), "--metrics", "fid", "--features", f"torchscript:{tmp_path / 'float.pt'}"]
    with pytest.raises(UserError, match="makes no features of bytes"):
        main([str(images), *words])
