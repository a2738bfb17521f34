"""What a step leaves in bf16 weights, which have 8 significant bits, and what is kept between steps."""

import builtins
import itertools

import pytest
import torch
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.core.descent import Descent
from erase_sd.core.optimizers import apply, make_optimizer, put, slots
from erase_sd.core.repair import Repair, repair

ULP = 2**-7  # the distance of two bf16 numbers in [1, 2)


def bf16(*shape: int, value: float = 1.0) -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.full(shape, value, dtype=torch.bfloat16))}


def stepped(theta: dict[str, nn.Parameter], rounding: str, steps: range, seed: int = 0, **knobs) -> dict[str, Tensor]:
    """The weights after updates of -1e-5 each, as a copy."""
    optimizer = make_optimizer(theta, Descent(lr=1e-5, rounding=rounding, **knobs))
    for step in steps:
        apply(optimizer, theta, {name: torch.ones(p.shape) for name, p in theta.items()}, rounding, seed, step)
    return {name: p.detach().clone() for name, p in theta.items()}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_thousand_steps_below_the_last_bit(sign: int) -> None:
    """From 1.5 by 1000 x 1e-5 to 1.49, or from -1.5 to -1.51: more than the distance of two bf16 numbers."""
    start, n = 1.5 * sign, 4000
    runs = {name: stepped(bf16(n, value=start), name, range(1000))["w"] for name in ("nearest", "stochastic", "kahan")}
    assert (runs["nearest"] == start).all()
    assert (runs["kahan"].float() - (start - 0.01)).abs().max() <= ULP / 2
    mean = runs["stochastic"].double().mean()
    # a binomial walk over the two neighbours: its standard deviation is at most sqrt(0.01 ULP) per weight
    assert abs(mean - (start - 0.01)) < 5 * (0.01 * ULP / n) ** 0.5
    assert runs["stochastic"].unique().numel() > 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_kahan_is_training_in_fp32(optimizer: str) -> None:
    """The two halves of a weight are its fp32 value, bit for bit, after any number of steps of any size."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(3000, generator=rng) * torch.logspace(-6, 3, 3000)
    narrow, wide = {"w": nn.Parameter(start.bfloat16())}, {"w": nn.Parameter(start.bfloat16().float())}
    knobs = Descent(lr=1e-3, optimizer=optimizer, momentum=0.9 * (optimizer == "sgd"), rounding="kahan")
    optimizers = make_optimizer(narrow, knobs), make_optimizer(wide, knobs)
    for step in range(20):
        g = torch.randn(3000, generator=rng)
        for optimizer_, theta in zip(optimizers, (narrow, wide), strict=True):
            apply(optimizer_, theta, {"w": g.clone()}, "kahan", 0, step)
    low = slots(optimizers[0], narrow)["w/kahan"]
    both = (narrow["w"].detach().view(torch.int16).int() * 65536 + low).view(torch.float32)
    assert low.dtype == torch.int16
    assert torch.equal(both, wide["w"])
    error = (narrow["w"].float() - wide["w"]).abs()
    assert (error <= (wide["w"].bfloat16().float() - wide["w"]).abs()).all()  # as near as any bf16 number


def test_stochastic_rounding_is_unbiased_and_leaves_bf16_numbers_alone() -> None:
    x = torch.tensor([1 + ULP / 4, -1 - ULP / 4, 3e-39, 1.0, -0.0, 2.0**100])
    theta = {"w": nn.Parameter(torch.zeros(20_000, len(x), dtype=torch.bfloat16))}
    optimizer = make_optimizer(theta, Descent(lr=1.0))
    apply(optimizer, theta, {"w": -x.expand(20_000, -1)}, "stochastic", 7, 0)
    w = theta["w"].detach().double()
    assert ((w[:, :2] == torch.tensor([1.0, -1.0])).double().mean(0) - 0.75).abs().max() < 0.015
    assert abs(w[:, 2].mean() / 3e-39 - 1) < 0.01
    assert (w[:, 3:] == x[3:].double()).all()


def test_rounding_depends_on_seed_step_and_name_alone() -> None:
    def once(seed: int, step: int, name: str) -> Tensor:
        theta = {name: nn.Parameter(torch.ones(500, dtype=torch.bfloat16))}
        optimizer = make_optimizer(theta, Descent(lr=1e-3))
        torch.rand(3)  # the global generator must not matter
        apply(optimizer, theta, {name: torch.ones(500)}, "stochastic", seed, step)
        return theta[name].detach()

    runs = {key: once(*key) for key in itertools.product((0, 1), (0, 1), "ab")}
    for (a, x), (b, y) in itertools.combinations_with_replacement(runs.items(), 2):
        assert torch.equal(x, y) == (a == b)
    assert torch.equal(once(0, 1, "a"), runs[0, 1, "a"])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_bf16_resumes_bit_for_bit(toy, rounding: str, optimizer: str) -> None:
    knobs = Repair(steps=8, lr=1e-3, optimizer=optimizer, rounding=rounding)
    whole = toy(dtype=torch.bfloat16)
    list(repair(whole, knobs))
    for stop in (1, 4, 7):
        first, second = toy(dtype=torch.bfloat16), toy(dtype=torch.bfloat16)
        *_, (_, state) = itertools.islice(repair(first, knobs), stop)
        stored = {"step": state["step"], "optimizer": {key: x.clone() for key, x in state["optimizer"].items()}}
        second.model.load_state_dict(first.model.state_dict())
        list(repair(second, knobs, stored))
        for (name, p), q in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
            assert p.dtype == torch.bfloat16, name
            assert torch.equal(p, q), name


def test_between_steps_no_weight_exists_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erase_sd.core.optimizers.BUCKET", 10)
    theta = {str(i): nn.Parameter(torch.ones(6, dtype=torch.bfloat16)) for i in range(5)}
    optimizer = make_optimizer(theta, Descent(optimizer="adamw"))
    sizes, step = [], optimizer.step

    def alive() -> int:
        return sum(p.numel() for p in optimizer.param_groups[0]["params"])

    def measured() -> None:
        sizes.append(alive())
        step()

    monkeypatch.setattr(optimizer, "step", measured)
    apply(optimizer, theta, {name: torch.ones(6) for name in theta}, "nearest", 0, 0)
    assert sizes == [12, 12, 6]
    assert alive() == 0
    assert all(x.dtype == torch.float32 for x in slots(optimizer, theta).values())


def test_kahan_and_a_projection_after_the_optimizer_are_refused() -> None:
    with pytest.raises(UserError, match="--rounding kahan.*--projection on"):
        Repair(rounding="kahan", projection="after-preconditioning")


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged-adamw8bit"])
def test_without_bitsandbytes_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    find = builtins.__import__

    def missing(name: str, *args, **more):
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return find(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=f"--optimizer {optimizer} needs bitsandbytes.*or use --optimizer adamw"):
        make_optimizer(bf16(3), Descent(optimizer=optimizer))


def test_pages_need_a_cuda_device() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="paged-adamw8bit pages out of a CUDA device"):
        make_optimizer(bf16(3), Descent(optimizer="paged-adamw8bit"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_follow_adamw_and_resume_bit_for_bit(dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")

    def new() -> dict[str, nn.Parameter]:
        rng = torch.Generator().manual_seed(1)
        sizes = {"large": (100, 100), "other": (64, 100), "small": (10,)}  # below 4096 entries it keeps 32 bits
        return {name: nn.Parameter(torch.randn(size, generator=rng).to(dtype)) for name, size in sizes.items()}

    def run(theta: dict, name: str, steps: range, stored: dict | None = None):
        optimizer = make_optimizer(theta, Descent(lr=1e-2, optimizer=name, rounding="kahan"))
        put(optimizer, theta, stored or {})
        for step in steps:
            rng = torch.Generator().manual_seed(step)
            g = {n: torch.randn(p.shape, generator=rng) + 0.5 for n, p in theta.items()}
            apply(optimizer, theta, g, "kahan", 0, step)
        return {n: x.clone() for n, x in slots(optimizer, theta).items()}

    whole, full, again = new(), new(), new()
    state = run(whole, "adamw8bit", range(6))
    run(full, "adamw", range(6))
    run(again, "adamw8bit", range(3, 6), run(again, "adamw8bit", range(3)))
    assert state["large/state1"].dtype == torch.uint8
    assert state["small/state1"].dtype == torch.float32
    assert len({x.data_ptr() for x in state.values()}) == len(state)  # safetensors stores no tensor twice
    for name in whole:
        assert torch.equal(whole[name], again[name])
        assert (
            (whole[name].float() - full[name].float()).abs().mean() < 0.01 < (whole[name] - new()[name]).abs().mean()
        )
