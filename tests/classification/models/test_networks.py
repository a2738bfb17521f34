"""The networks against transformers' own ResNet, the initialisation against its formula, weights through files."""

import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from classification.models import pretrained
from classification.models.networks import MODELS, build
from erase_sd.common.errors import UserError
from erase_sd.common.rng import keyed_rng

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def make(name: str = "smallnet", classes: int = 10, seed: int = 0, **more) -> nn.Module:
    return build(name, classes=classes, channels=3, mean=MEAN, std=STD, seed=seed, **more)


def images(size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(1))


def normalized(x: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return (x - mean[:, None, None]) / std[:, None, None]


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every expected tensor is there, bit for bit."""
    for name, x in expected.items():
        assert torch.equal(state[name], x), name


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [("resnet18", 10, 11_173_962), ("resnet18", 100, 11_220_132), ("resnet34", 307, 21_442_163)],
)
def test_parameter_counts_are_the_papers(name, classes, count):
    assert sum(p.numel() for p in make(name, classes).parameters()) == count


def transformers_name(name: str) -> str:
    """What transformers calls a parameter of torchvision's ResNet."""
    parts = name.split(".")
    if parts[0] in ("conv1", "bn1"):
        parts[0] = f"resnet.embedder.embedder.{'convolution' if parts[0] == 'conv1' else 'normalization'}"
    elif parts[0] == "fc":
        parts[0] = "classifier.1"
    else:
        layer, block, kind = parts[:3]
        at = f"resnet.encoder.stages.{int(layer[-1]) - 1}.layers.{block}"
        if kind == "downsample":
            parts[:4] = [at, "shortcut", ("convolution", "normalization")[int(parts[3])]]
        else:
            parts[:3] = [at, "layer", str(int(kind[-1]) - 1), "convolution" if "conv" in kind else "normalization"]
    return ".".join(parts)


def without_normalize(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that torchvision's networks have."""
    state = model.state_dict()
    del state["normalize.mean"], state["normalize.std"]
    return state


@pytest.mark.parametrize(("name", "depths"), [("resnet18", [2, 2, 2, 2]), ("resnet34", [3, 4, 6, 3])])
def test_resnets_compute_what_transformers_resnet_computes(name, depths):
    model = make(name, 7)
    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=depths, layer_type="basic", num_labels=7)
    oracle = ResNetForImageClassification(config)
    if name == "resnet18":
        oracle.resnet.embedder.embedder.convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        oracle.resnet.embedder.pooler = nn.Identity()
    state = {transformers_name(n): x for n, x in without_normalize(model).items()}
    oracle.load_state_dict(state)
    x = images(64)
    for mode in (True, False):  # batch statistics, then the running ones that this left
        ours, theirs = model.train(mode)(x), oracle.train(mode)(normalized(x)).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_convolutions_are_kaiming_normal_and_the_rest_is_pytorchs_default():
    model = make("resnet18")
    w = model.layer4[1].conv2.weight.detach()
    sigma = math.sqrt(2 / (512 * 9))
    assert w.std().item() == pytest.approx(sigma, rel=0.005)
    assert abs(w.mean().item()) < 4 * sigma / math.sqrt(w.numel())
    assert ((w / sigma).abs() > 2).double().mean().item() == pytest.approx(0.0455, abs=0.001)  # a normal's tails
    wider = model.layer2[0].conv1.weight.detach()  # 64 channels in, 128 out
    assert wider.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.01)
    assert (model.bn1.weight == 1).all()
    assert (model.bn1.bias == 0).all()
    assert model.fc.weight.abs().max() <= 1 / math.sqrt(512)


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_alone_decides_and_the_global_state_stays(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make(name, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = make(name, seed=1).state_dict(), make(name, seed=2).state_dict()
    assert_same(again, first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_keyed_rng_restores_the_global_state_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), keyed_rng(0, "x"):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", MODELS)
def test_models_normalise_inside_by_buffers(name):
    model = make(name, 5).eval()
    x = images()
    plain = build(name, classes=5, channels=3, mean=(0, 0, 0), std=(1, 1, 1), seed=0).eval()
    torch.testing.assert_close(model(x), plain(normalized(x)))
    assert model(x).shape == (4, 5)
    assert dict(model.normalize.named_buffers()).keys() == {"mean", "std"}
    assert not dict(model.normalize.named_parameters())


def test_smallnet_reads_digits_within_seconds():
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    order = torch.Generator().manual_seed(0)
    train, test = torch.randperm(len(y), generator=order).split(1400)
    model = build("smallnet", classes=10, channels=1, mean=[0.3], std=[0.38], seed=0)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(15):
        for rows in train[torch.randperm(1400, generator=order)].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    assert (model(x[test]).argmax(1) == y[test]).double().mean() >= 0.975


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "wrapped.pth"])
def test_weights_come_from_files_with_torchvisions_names(tmp_path, suffix):
    source = make("resnet34", 4, seed=1)
    state = without_normalize(source)
    file = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if suffix == "wrapped.pth" else state, file)
    same = make("resnet34", 4, seed=2, weights=str(file))
    assert_same(same.state_dict(), source.state_dict())
    other = make("resnet34", 6, seed=2, weights=str(file))
    assert torch.equal(other.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    assert torch.equal(other.fc.weight, make("resnet34", 6, seed=2).fc.weight)


def test_the_hub_is_asked_for_torchvisions_resnet34(tmp_path, monkeypatch):
    source = make("resnet34", 1000, seed=1)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *args: asked.append(args) or str(tmp_path / "model.safetensors")
    )
    model = make("resnet34", 307, weights="hub")
    assert asked == [("timm/resnet34.tv_in1k", "model.safetensors")]
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert model.fc.out_features == 307


class Evil:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys):
    save_file(make("smallnet").state_dict(), tmp_path / "small.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "broken.pth").write_bytes(b"no")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"epoch": 3, "fc.weight": torch.zeros(1)}, tmp_path / "more.pth")
    for file, message in {
        "absent.pth": "does not exist",
        "small.safetensors": "bn1.bias is absent there and \\(64,\\) in the model",
        "broken.safetensors": "cannot be read",
        "broken.pth": "cannot be read",
        "evil.pth": "cannot be read",
        "more.pth": "more than tensors",
    }.items():
        with pytest.raises(UserError, match=message):
            make("resnet34", weights=str(tmp_path / file))
    assert "ran code" not in capsys.readouterr().out
    with pytest.raises(UserError, match="hub exists for resnet34 only"):
        make("resnet18", weights="hub")
    monkeypatch.setattr(pretrained, "HUB", {"resnet34": "nobody/has-this"})
    with pytest.raises(UserError, match="cannot get nobody/has-this"):
        make("resnet34", weights="hub")


def test_names_and_channels_are_checked(tmp_path):
    with pytest.raises(UserError, match="unknown model resnet19: choose resnet18, resnet34, smallresnet, smallnet"):
        make("resnet19")
    with pytest.raises(UserError, match="one entry for each of the 1 channels"):
        build("smallnet", classes=2, channels=1, mean=MEAN, std=STD, seed=0)
    with pytest.raises(UserError, match="cannot load .*nowhere"):
        make(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="cannot load .* as an image classifier"):
        make(str(tmp_path))
    with pytest.raises(UserError, match="brings its own"):
        make(str(tmp_path), weights="hub")


def tiny_vit() -> ViTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)


def tiny_resnet() -> ResNetConfig:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return ResNetConfig(**sizes, layer_type="basic", num_labels=5)


@pytest.mark.parametrize(
    ("kind", "config"), [(ViTForImageClassification, tiny_vit()), (ResNetForImageClassification, tiny_resnet())]
)
def test_any_classifier_of_transformers_by_name(tmp_path, kind, config):
    with keyed_rng(0, "test"):
        source = kind(config).eval()
    source.save_pretrained(tmp_path)
    x = images(16)
    before = torch.get_rng_state()
    same, other, again = make(str(tmp_path), 5), make(str(tmp_path), 9), make(str(tmp_path), 9)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(layer.training for layer in same.modules())
    assert all(p.requires_grad for p in same.parameters())
    torch.testing.assert_close(same.eval()(x), source(normalized(x)).logits)
    assert other.eval()(x).shape == (4, 9)
    assert_same(again.state_dict(), other.state_dict())


def test_half_precision_files_become_float32_models(tmp_path):
    ViTForImageClassification(tiny_vit()).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in make(str(tmp_path), 5).parameters()} == {torch.float32}


def test_images_are_resized_to_what_a_vit_was_made_for(tmp_path):
    ViTForImageClassification(tiny_vit()).save_pretrained(tmp_path)
    model = make(str(tmp_path), 5).eval()
    x = images(16)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert model(large).shape == (4, 5)
    x = torch.full((2, 3, 16, 16), 0.3)
    torch.testing.assert_close(model(F.pad(x, (4, 4, 4, 4), value=0.3)), model(x))


def test_a_transformers_model_must_be_whole_and_fit(tmp_path):
    ViTForImageClassification(tiny_vit()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes images of 3 channels, not 1"):
        build(str(tmp_path), classes=5, channels=1, mean=[0.5], std=[0.5], seed=0)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(n for n in state if "layernorm_before.weight" in n)
    save_file({n: x for n, x in state.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks weights besides its head, such as .*layernorm_before.weight"):
        make(str(tmp_path), 5)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot load .* as an image classifier"):
        make(str(tmp_path), 5)


def test_a_backbone_without_a_head_gets_one(tmp_path):
    with keyed_rng(0, "test"):
        source = ViTModel(tiny_vit(), add_pooling_layer=False)
    source.save_pretrained(tmp_path)
    model = make(str(tmp_path), 3)
    assert torch.equal(model.model.vit.embeddings.cls_token, source.embeddings.cls_token)
    assert model(images(16)).shape == (4, 3)
