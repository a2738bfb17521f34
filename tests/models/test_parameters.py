"""Parameter groups, counted on SD v1.4's own UNet."""

import pytest

from erase_sd.common.errors import UserError
from erase_sd.models.parameters import GROUPS, select, without_norms

SIZES = {  # stable-diffusion.md, a.7
    "full": 859_520_964,
    "xattn": 43_962_560,
    "selfattn": 49_574_080,
    "noxattn": 813_495_680,
    "notime": 857_458_240,
    "xlayer": 3_605_760,
    "selflayer": 8_193_920,
    "kv": 19_169_280,
    "authors": 8_193_920,
    "attn": 43_962_560 + 49_574_080,
}


@pytest.mark.parametrize("group", GROUPS["UNet2DConditionModel"])
def test_group_sizes_on_sd14(sd14_unet, group: str) -> None:
    assert sum(p.numel() for p in select(sd14_unet, group).values()) == SIZES[group]


def test_authors_group_is_ten_tensors(sd14_unet) -> None:
    assert len(select(sd14_unet, "authors")) == 10


def test_regular_expression_as_group(sd14_unet) -> None:
    assert list(select(sd14_unet, r"re:^conv_out\.")) == ["conv_out.weight", "conv_out.bias"]


@pytest.mark.parametrize("scope", ["everything", "re:[", "re:no_such_layer", ""])
def test_bad_groups_list_the_good_ones(sd14_unet, scope: str) -> None:
    with pytest.raises(UserError, match="full, attn, xattn") as error:
        select(sd14_unet, scope)
    assert repr(scope) in str(error.value)


def test_norms_are_left_out(sd14_unet) -> None:
    kept = without_norms(sd14_unet, select(sd14_unet, "full"))
    assert "conv_in.weight" in kept
    assert not [name for name in kept if "norm" in name]
    assert len(kept) < len(select(sd14_unet, "full"))
