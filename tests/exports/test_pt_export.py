"""A run as a file of torch.save."""

from pathlib import Path

import numpy as np
import pytest
import torch

from erase_sd.export import main
from erase_sd.pipeline import load
from erase_sd.process import UserError
from tests.exports.conftest import Run, picture


def exported(run: Run, output: Path) -> Path:
    assert main([str(run.folder), "--to", "pt", "--output", str(output)]) == 0
    return output


def test_it_loads_strictly_and_draws_what_the_run_draws(run: Run, tmp_path: Path) -> None:
    """As UnlearnDiffAtk loads its --task.target_ckpt, but for weights_only, which it does not ask for."""
    pipe = load(str(run.base))
    pipe.unet.load_state_dict(torch.load(exported(run, tmp_path / "cat.pt"), weights_only=True))
    assert np.array_equal(picture(pipe), picture(run.erased()))


def test_weights_are_plain_contiguous_float32(sd1: Run, tmp_path: Path) -> None:
    for x in torch.load(exported(sd1, tmp_path / "cat.pt"), weights_only=True).values():
        assert type(x) is torch.Tensor
        assert x.dtype == torch.float32
        assert x.is_contiguous()


def test_a_ckpt_is_the_whole_model_in_the_ldm_layout(sd1: Run, tmp_path: Path) -> None:
    weights = torch.load(exported(sd1, tmp_path / "cat.ckpt"), weights_only=True)["state_dict"]
    assert "model.diffusion_model.input_blocks.1.0.in_layers.0.weight" in weights
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in weights


def test_a_path_that_unlearndiffatk_misreads_is_refused(sd1: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads a path with text_encoder as a text encoder"):
        exported(sd1, tmp_path / "text_encoder_cat.pt")
