"""UNets of other projects: every tensor of the file, and no other, is in the pipeline afterwards, or a sentence says
why not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.exports.ldm import unet as ldm_unet
from erase_sd.models.foreign import Artefacts, put
from erase_sd.models.pipeline import load, save_network
from tests.models.foreign.conftest import copied, differing

Weights = dict[str, Tensor]


def line(pipe: StableDiffusionPipeline, source: object) -> str:
    """Put a UNet into the pipeline and return what it was said to be."""
    return put(pipe, Artefacts(unet=str(source)))[0].line


def esd_x(theirs: Weights) -> Weights:
    return {name: x for name, x in theirs.items() if ".attn2." in name}


def uce(theirs: Weights) -> Weights:
    return {name: x for name, x in theirs.items() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}


@pytest.mark.parametrize(("part", "count", "called"), [(esd_x, 80, "ESD"), (uce, 32, "UCE")])
def test_a_part_changes_its_own_tensors_alone(
    tiny_pipe: StableDiffusionPipeline,
    theirs: Weights,
    tmp_path: Path,
    part: Callable[[Weights], Weights],
    count: int,
    called: str,
):
    before, weights = copied(tiny_pipe.unet.state_dict()), part(theirs)
    save_file(weights, tmp_path / "part.safetensors")
    said = line(tiny_pipe, tmp_path / "part.safetensors")
    assert said == f"part.safetensors: {called}, {count} of 684 tensors of the UNet"
    assert differing(tiny_pipe.unet.state_dict(), before | weights) == set()


@pytest.mark.parametrize("prefix", ["", "unet.", "module."])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_whole_state_dict_is_read(
    tiny_pipe: StableDiffusionPipeline, theirs: Weights, tmp_path: Path, prefix: str, suffix: str
):
    torch.save({prefix + name: x for name, x in theirs.items()}, tmp_path / f"u{suffix}")
    assert line(tiny_pipe, tmp_path / f"u{suffix}") == f"u{suffix}: a whole UNet, 684 of 684 tensors of the UNet"
    assert differing(tiny_pipe.unet.state_dict(), theirs) == set()


@pytest.fixture
def checkpoint(tiny_pipe: StableDiffusionPipeline, theirs: Weights, tmp_path: Path) -> Path:
    """A CompVis checkpoint: the network, an averaged copy of twice its values, and the rest of the pipeline."""
    weights = {"first_stage_model.quant_conv.bias": torch.zeros(8), "betas": torch.zeros(1000)}
    for name, x in ldm_unet(theirs, tiny_pipe.unet.config).items():
        weights[f"model.diffusion_model.{name}"] = x
        weights["model_ema.diffusion_model" + name.replace(".", "")] = 2 * x
    weights["model_ema.decay"] = torch.tensor(0.99)
    torch.save({"state_dict": weights, "global_step": 7, "lr": 0.1}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_a_checkpoint_gives_its_network_and_says_that_there_is_an_average(
    tiny_pipe: StableDiffusionPipeline, theirs: Weights, checkpoint: Path
):
    said = line(tiny_pipe, checkpoint)
    assert "a whole UNet, 684 of 684 tensors of the UNet, LDM layout" in said
    assert f"{checkpoint}@ema takes it" in said
    assert differing(tiny_pipe.unet.state_dict(), theirs) == set()


def test_the_average_is_taken_on_request(tiny_pipe: StableDiffusionPipeline, theirs: Weights, checkpoint: Path):
    assert "averaged (EMA)" in line(tiny_pipe, f"{checkpoint}@ema")
    assert differing(tiny_pipe.unet.state_dict(), {name: 2 * x for name, x in theirs.items()}) == set()


def test_an_average_in_a_dictionary_of_its_own(tiny_pipe: StableDiffusionPipeline, theirs: Weights, tmp_path: Path):
    doubled = {name: 2 * x for name, x in theirs.items()}
    torch.save({"unet": theirs, "unet_ema": doubled}, tmp_path / "both.pt")
    line(tiny_pipe, tmp_path / "both.pt")
    assert differing(tiny_pipe.unet.state_dict(), theirs) == set()
    line(tiny_pipe, f"{tmp_path / 'both.pt'}@ema")
    assert differing(tiny_pipe.unet.state_dict(), doubled) == set()


def test_a_folder_is_loaded_as_the_network_that_it_is(tiny_pipe: StableDiffusionPipeline, tmp_path: Path):
    unet = type(tiny_pipe.unet).from_config(tiny_pipe.unet.config)
    save_network(unet, tmp_path, "unet")
    assert "684 of 684" in line(tiny_pipe, tmp_path)
    assert differing(tiny_pipe.unet.state_dict(), unet.state_dict()) == set()


def refused(pipe: StableDiffusionPipeline, source: object, match: str) -> None:
    """Assert that a source is refused and nothing of it is in the pipeline."""
    before = copied(pipe.unet.state_dict())
    with pytest.raises(UserError, match=match):
        line(pipe, source)
    assert differing(pipe.unet.state_dict(), before) == set()


def test_other_shapes_are_named(tiny_pipe: StableDiffusionPipeline, theirs: Weights, tmp_path: Path):
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    save_file(esd_x(theirs) | {key: torch.zeros(320, 768)}, tmp_path / "sd.safetensors")
    name = key.replace(".", r"\.")
    refused(tiny_pipe, tmp_path / "sd.safetensors", rf"{name} \(320, 768\) where the base has {name} \(16, 32\)")


def test_tensors_of_another_network_are_named(tiny_pipe: StableDiffusionPipeline, theirs: Weights, tmp_path: Path):
    save_file(esd_x(theirs) | {"up_blocks.9.attn2.to_k.weight": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    refused(tiny_pipe, tmp_path / "x.safetensors", r"1 of its 81 tensors .*up_blocks\.9\.attn2\.to_k\.weight \(2, 3\)")


@pytest.mark.parametrize(
    ("key", "step"),
    [
        ("lora_unet_mid_block_x.lora_down.weight", "--adapter"),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", "--text_encoder"),
        ("something.else", "something.else"),
    ],
)
def test_other_kinds_are_named(tiny_pipe: StableDiffusionPipeline, tmp_path: Path, key: str, step: str):
    save_file({key: torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    refused(tiny_pipe, tmp_path / "x.safetensors", step)


def test_an_average_that_is_not_there_is_said(tiny_pipe: StableDiffusionPipeline, theirs: Weights, tmp_path: Path):
    torch.save(theirs, tmp_path / "u.pt")
    refused(tiny_pipe, f"{tmp_path / 'u.pt'}@ema", "no averaged copy")


def test_what_is_not_finite_is_refused(tiny_pipe: StableDiffusionPipeline, theirs: Weights, tmp_path: Path):
    save_file({name: x * torch.nan for name, x in uce(theirs).items()}, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="NaN or infinite"):
        line(tiny_pipe, tmp_path / "nan.safetensors")


class Executed:
    """Pickled, it is a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_nothing_in_a_pickle_is_executed(tiny_pipe: StableDiffusionPipeline, tmp_path: Path, suffix: str):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Executed(tmp_path / "ran")}, tmp_path / f"x{suffix}")
    refused(tiny_pipe, tmp_path / f"x{suffix}", "more than tensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("x.safetensors", b"\0" * 40, "damaged"),
        ("x.pt", b"PK\3\4 cut short", "damaged"),
        ("x.txt", b"", "no weight file"),
    ],
)
def test_files_that_cannot_be_read(
    tiny_pipe: StableDiffusionPipeline, tmp_path: Path, name: str, content: bytes, match: str
):
    (tmp_path / name).write_bytes(content)
    refused(tiny_pipe, tmp_path / name, match)


def test_a_pipeline_without_a_unet(tiny_sd3: Path, tmp_path: Path):
    with pytest.raises(UserError, match="has no UNet"):
        line(load(str(tiny_sd3)), tmp_path)


def test_a_file_that_is_not_there(tiny_pipe: StableDiffusionPipeline, tmp_path: Path):
    refused(tiny_pipe, tmp_path / "x.pt", "does not exist")
