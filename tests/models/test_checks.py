"""Bad models: each is refused with one sentence that names the bad value, before anything is computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from erase_sd.common.errors import UserError
from erase_sd.models.checks import check_editable
from erase_sd.models.pipeline import load, load_network
from erase_sd.run.record import weights_hash

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_sd: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may break."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def edit(file: Path, change: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "models/sd/v1", "C:\\models\\sd", "~/sd", ""])
def test_missing_path_is_not_taken_for_a_hub_id(path: str) -> None:
    with pytest.raises(UserError, match="does not exist") as error:
        load(path)
    assert repr(path) in str(error.value)


def test_path_below_an_existing_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="folder runs has no cat"):
        load("runs/cat")


def test_unreachable_hub_names_the_ways_out() -> None:
    with pytest.raises(UserError, match="point --model at a folder.*--model pocket") as error:
        load("CompVis/no-such-model")
    assert "CompVis/no-such-model" in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_without_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_index.json"):
        load(str(tmp_path))


def test_weight_file_instead_of_a_folder(model: Path) -> None:
    with pytest.raises(UserError, match="give --model_config"):
        load(str(model / UNET_FILE))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_component(model: Path, part: str) -> None:
    shutil.rmtree(model / part)
    with pytest.raises(UserError, match=f"has no {part}/"):
        load(str(model))


def test_missing_config(model: Path) -> None:
    (model / "text_encoder" / "config.json").unlink()
    with pytest.raises(UserError, match="text_encoder has no config.json"):
        load(str(model))


def test_missing_weights(model: Path) -> None:
    (model / UNET_FILE).unlink()
    with pytest.raises(UserError, match="unet has no weight file"):
        load(str(model))


def test_truncated_weights(model: Path) -> None:
    content = (model / UNET_FILE).read_bytes()
    (model / UNET_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors is damaged"):
        load(str(model))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (UNET_FILE, "conv_out.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "quant_conv.weight"),
        ("text_encoder/model.safetensors", "final_layer_norm.weight"),
    ],
)
def test_partial_weights(model: Path, file: str, name: str) -> None:
    weights = load_file(model / file)
    del weights[name]
    save_file(weights, model / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"no value for {name}"):
        load(str(model))


def as_variant(model: Path, *files: str) -> None:
    """Give files the names that save_pretrained(variant="fp16") gives them, and their precision."""
    for file in files:
        weights = {name: tensor.half() for name, tensor in load_file(model / file).items()}
        save_file(weights, str(model / file).replace(".safetensors", ".fp16.safetensors"), metadata={"format": "pt"})
        (model / file).unlink()


ENCODER_FILE = "text_encoder/model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("files", [(UNET_FILE, VAE_FILE, ENCODER_FILE), (UNET_FILE,)], ids=["all", "the unet"])
def test_a_variant_is_found_where_there_is_nothing_else(model: Path, tiny_pipe, files: tuple[str, ...]) -> None:
    as_variant(model, *files)
    found = load(str(model)).unet.state_dict()
    for name, x in tiny_pipe.unet.state_dict().items():
        assert torch.equal(found[name], x.half().float()), name


def test_a_variant_of_a_network_is_found(model: Path, tiny_pipe) -> None:
    as_variant(model, UNET_FILE)
    assert load_network(str(model), "unet", torch.float32).dtype == torch.float32


def test_a_variant_beside_whole_files_is_left_alone(model: Path, tiny_pipe) -> None:
    shutil.copy(model / UNET_FILE, model / "unet/diffusion_pytorch_model.fp16.safetensors")
    (model / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    assert weights_hash(load(str(model)).unet) == weights_hash(tiny_pipe.unet)


def compiled(pipe: StableDiffusionPipeline) -> None:
    pipe.unet = torch.compile(pipe.unet)


def compiled_in_place(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.compile()


def with_adapter(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def offloaded(pipe: StableDiffusionPipeline) -> None:
    pipe.text_encoder = cpu_offload(pipe.text_encoder, torch.device("cpu"))


def of_two_dtypes(pipe: StableDiffusionPipeline) -> None:
    pipe.text_encoder.to(torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compiled, "the unet is compiled"),
        (compiled_in_place, "the unet is compiled"),
        (with_adapter, r"the unet carries a LoRA \(.*lora_A"),
        (offloaded, "the text_encoder is offloaded layer by layer"),
        (of_two_dtypes, "float32 and a text_encoder in float16|a text_encoder in float16 and"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_pipeline_that_cannot_be_edited_is_refused(tiny_pipe, change: Callable, message: str) -> None:
    check_editable(tiny_pipe)
    change(tiny_pipe)
    with pytest.raises(UserError, match=message):
        check_editable(tiny_pipe)


def test_text_encoder_of_an_older_transformers(model: Path) -> None:
    file = model / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    load(str(model))


def test_empty_tokenizer(model: Path) -> None:
    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").mkdir()
    with pytest.raises(UserError, match="tokenizer"):
        load(str(model))


def test_tokenizer_of_another_length(model: Path) -> None:
    edit(model / "tokenizer" / "tokenizer_config.json", {"model_max_length": 512})
    with pytest.raises(UserError, match="model_max_length is 512"):
        load(str(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model: Path, value: float) -> None:
    weights = load_file(model / UNET_FILE)
    weights["conv_in.weight"][0, 0, 0, 0] = value
    save_file(weights, model / UNET_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="conv_in.weight has NaN"):
        load(str(model))


def test_inpainting_unet(model: Path, tiny_pipe) -> None:
    config = dict(tiny_pipe.unet.config) | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(str(model / "unet"))
    with pytest.raises(UserError, match="takes 9 channels"):
        load(str(model))


def test_unet_of_another_base(model: Path, tmp_path: Path, tiny_pipe) -> None:
    config = dict(tiny_pipe.unet.config) | {"cross_attention_dim": 48}
    UNet2DConditionModel.from_config(config).save_pretrained(str(tmp_path / "run" / "unet"))
    with pytest.raises(UserError, match="text 48 wide"):
        load(str(model), unet=str(tmp_path / "run"))


def test_other_families_are_refused_by_their_index(model: Path) -> None:
    edit(model / "model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]})
    with pytest.raises(UserError, match="text_encoder_2"):
        load(str(model))
