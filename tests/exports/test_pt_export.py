"""A run as a file of torch.save."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from erase_sd.common.errors import UserError
from tests.exports.conftest import Run, export, picture, wanted


def test_it_loads_strictly_and_draws_what_the_run_draws(run: Run, tmp_path: Path) -> None:
    """As UnlearnDiffAtk loads its --task.target_ckpt, but for weights_only, which it does not ask for."""
    weights = torch.load(export(run, "pt", tmp_path / "cat.pt"), weights_only=True)
    pipe = copy.deepcopy(run.original())
    pipe.unet.load_state_dict(weights)
    assert np.array_equal(picture(pipe), wanted(run))
    for x in weights.values():
        assert type(x) is torch.Tensor
        assert x.dtype == torch.float32
        assert x.is_contiguous()


def test_a_ckpt_is_the_whole_model_in_the_ldm_layout(sd1: Run, tmp_path: Path) -> None:
    weights = torch.load(export(sd1, "pt", tmp_path / "cat.ckpt"), weights_only=True)["state_dict"]
    assert "model.diffusion_model.input_blocks.1.0.in_layers.0.weight" in weights
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in weights


def test_a_path_that_unlearndiffatk_misreads_is_refused(sd1: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads a path with text_encoder as a text encoder"):
        export(sd1, "pt", tmp_path / "text_encoder_cat.pt")
