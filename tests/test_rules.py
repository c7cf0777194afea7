"""The rules that make weights ternary, against their definitions: codes, scales, gradients, packing."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from ternary_ssm import TernaryConfig, pack_, quantize_, reference
from ternary_ssm.layers import TernaryLinear
from ternary_ssm.quantizer import FakeQuantize, TernaryWeight

RULES = ["absmean", "twn", "mse", "binary", "learned", "bounded"]
FREE, TRAINED = RULES[:4], {"learned": "scale", "bounded": "logit"}
GROUPS = [32, 96, "row", "tensor"]


def codes_and_scales(weight, rule, group="row", dtype="float32"):
    ternary = TernaryWeight.from_float(weight, TernaryConfig(group, rule, dtype))
    return reference.unpack(ternary.codes), ternary.scales


def fake_linear(config, n=7, k=192, dtype=torch.float32, device="cpu", perturb=True):
    """A Linear under QAT whose trained scales, if any, have moved."""
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=False, dtype=dtype, device=device)
    linear = quantize_(nn.Sequential(linear), config, lambda *_: True)[0]
    if perturb and config.trains_scales:
        (trained,) = linear.parametrizations.weight[0].parameters()
        with torch.no_grad():
            change = torch.randn_like(trained)
            trained.add_(change if config.rule == "bounded" else 0.3 * change * trained)
    return linear


# --- codes and scales ---------------------------------------------------------------------------------------


def test_by_hand():
    weight = torch.tensor([[5.0, -1, 1, 1, -0.5, 0.5, 0, 0]])  # mean |w| 9 / 8
    by_rule = {
        "absmean": ([1, -1, 1, 1, 0, 0, 0, 0], 9 / 8),
        "twn": ([1, -1, 1, 1, 0, 0, 0, 0], 2),  # threshold 0.7875
        "mse": ([1, 0, 0, 0, 0, 0, 0, 0], 5),  # 25 / 1 against 64 / 4
        "binary": ([1, -1, 1, 1, -1, 1, 0, 0], 9 / 8),
    }
    for rule, (codes, scale) in by_rule.items():
        found = codes_and_scales(weight, rule)
        assert (found[0].tolist(), found[1].tolist()) == ([codes], [[scale]]), rule


@pytest.mark.parametrize("rule", FREE)
def test_zeros_and_equal_weights(rule):
    assert [t.tolist() for t in codes_and_scales(torch.zeros(1, 4), rule)] == [[[0, 0, 0, 0]], [[0]]]
    weight = torch.tensor([[0.5, -0.5, 0.5, 0.5]])
    assert [t.tolist() for t in codes_and_scales(weight, rule)] == [[[1, -1, 1, 1]], [[0.5]]]


def test_half_of_a_trained_scale_rounds_to_zero():
    weight, config = torch.tensor([[3.0, -3, 1, -1.125]]), TernaryConfig("row", "learned")
    ternary = TernaryWeight.from_float(weight, config, torch.tensor([[2.0]]))
    assert (reference.unpack(ternary.codes).tolist(), ternary.scales.tolist()) == ([[1, -1, 0, -1]], [[2]])


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group", GROUPS)
def test_twn_is_its_formula(group, scale_dtype, device):
    weight = torch.randn(5, 192, device=device)
    codes, scales = codes_and_scales(weight, "twn", group, scale_dtype)
    size = {"row": 192, "tensor": 5 * 192}.get(group, group)
    pairs = zip(weight.double().view(-1, size), codes.view(-1, size), scales.flatten(), strict=True)
    for w, code, scale in pairs:
        survivors = w.abs() > 0.7 * w.abs().mean()
        assert torch.equal(code, (w.sign() * survivors).to(torch.int8))
        assert scale == w[survivors].abs().mean().to(scale.dtype)


@pytest.mark.parametrize("ties", [False, True])
def test_mse_is_the_least_error_of_all_codes(ties, device):
    """Against every code of 8 weights, each with its own best scale (w . code) / (code . code)."""
    weight = torch.randn(40, 8, device=device)
    weight = weight.mul(2).round() if ties else weight * weight.abs()  # some groups have far outliers
    choices = torch.tensor(list(itertools.product((-1.0, 0, 1), repeat=8)), dtype=torch.float64).to(device)
    gain = (weight.double() @ choices.T).square() / choices.square().sum(1).clamp(min=1)
    least = weight.double().square().sum(1) - gain.max(1).values
    codes, scales = codes_and_scales(weight, "mse")
    error = (weight.double() - codes * scales.double()).square().sum(1)
    torch.testing.assert_close(error, least, rtol=1e-6, atol=1e-9)
    for row, code in zip(weight.abs(), codes.abs(), strict=True):
        assert not set(row[code == 1].tolist()) & set(row[code == 0].tolist())


def test_zero_ratios_and_errors_of_gaussian_weights():
    """Figures of the closed forms; absmean leaves a third more error than the others."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(3))
    for rule, zeros, error in (("absmean", 0.310, 0.263), ("twn", 0.423, 0.191), ("mse", 0.459, 0.190)):
        ternary = TernaryWeight.from_float(weight, TernaryConfig("tensor", rule, "float32"))
        assert ternary.zero_ratio() == pytest.approx(zeros, abs=3e-3)
        assert (ternary.dequantize() - weight).square().mean().item() == pytest.approx(error, abs=2e-3)


@pytest.mark.parametrize("rule", TRAINED)
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("group", GROUPS)
def test_trained_scales_begin_as_absmean(group, scale_dtype, rule):
    linear = fake_linear(TernaryConfig(group, rule, scale_dtype), perturb=False)
    weight = linear.parametrizations.weight.original
    expected = TernaryWeight.from_float(weight, TernaryConfig(group, "absmean", scale_dtype))
    assert torch.equal(linear.weight, expected.dequantize())


def test_a_bounded_scale_stays_below_twice_absmean():
    linear = fake_linear(TernaryConfig(32, "bounded", "float32"))
    weight = linear.parametrizations.weight
    absmean = TernaryWeight.from_float(weight.original, TernaryConfig(32, "absmean", "float32")).scales
    for logit, factor in ((-100.0, 0.0), (math.log(3), 1.5), (100.0, 2.0)):
        weight[0].logit.data.fill_(logit)
        torch.testing.assert_close(FakeQuantize.packed(linear).scales, factor * absmean)


@pytest.mark.parametrize("rule", RULES[1:])  # absmean: test_quantize.py
def test_refuses_what_is_not_finite(rule):
    """On the CPU, as the operator does; a GPU shows it in the scale."""
    for value in (math.nan, math.inf, 1e30):
        linear = fake_linear(TernaryConfig(32, rule))
        weight = linear.parametrizations.weight
        weight.original.data[2, 40] = value
        if rule == "learned" and value == 1e30:
            weight[0].scale.data[2, 1] = value
        with pytest.raises(RuntimeError, match=r"the scale of group \[2, 1\] is .*, expected finite weights"):
            _ = linear.weight


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rule", RULES)
def test_packed_is_what_training_saw(rule, group, dtype, device):
    for scale_dtype in ("float16", "bfloat16", "float32"):
        config = TernaryConfig(group, rule, scale_dtype)
        linear = fake_linear(config, dtype=dtype, device=device)
        packed = pack_(nn.Sequential(copy.deepcopy(linear)))[0]
        assert isinstance(packed, TernaryLinear)
        assert packed.weight_scale.dtype == config.torch_scale_dtype
        assert packed.weight_scale.shape == config.scales_shape(7, 192)
        assert torch.equal(packed.ternary.dequantize(dtype), linear.weight)
        assert linear.weight.dtype == dtype


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rule", RULES)
def test_gradients_match_autograd_through_the_plain_form(rule, group, device):
    """q = code * scale with constant codes, and the identity to the latent weight."""
    linear = fake_linear(TernaryConfig(group, rule, "float32"), device=device)
    weight = linear.parametrizations.weight
    target = torch.randn(7, 192, device=device)
    (linear.weight - target).square().sum().backward()

    latent = weight.original.detach().clone().requires_grad_()
    shape = TernaryConfig(group).scales_shape(7, 192)
    code = linear.weight.detach().sign()
    through = latent - latent.detach()  # 0, with the gradient of the latent weight
    if rule in TRAINED:
        trained = getattr(weight[0], TRAINED[rule]).detach().clone().requires_grad_()
        scales = trained
        if rule == "bounded":
            size = 7 * 192 // math.prod(shape)
            scales = latent.detach().abs().view(*shape, size).mean(-1) * 2 / (1 + (-trained).exp())
        each = scales.repeat_interleave(192 // shape[1], 1).expand(7, 192)
        (code * each + through - target).square().sum().backward()
        found = next(weight[0].parameters()).grad
        torch.testing.assert_close(found, trained.grad, rtol=1e-4, atol=1e-4)
        assert found.abs().min() > 0
    else:
        assert not list(weight[0].parameters())
        (linear.weight.detach() + through - target).square().sum().backward()
    torch.testing.assert_close(weight.original.grad, latent.grad, rtol=1e-5, atol=1e-5)


def test_a_learned_scale_below_zero_counts_as_zero_and_comes_back():
    linear = fake_linear(TernaryConfig(32, "learned"))
    weight = linear.parametrizations.weight
    weight[0].scale.data.fill_(-0.1)
    assert not linear.weight.any() and linear.weight.isfinite().all()
    (linear.weight - weight.original.detach()).square().sum().backward()
    assert (weight[0].scale.grad < 0).all()  # a step of descent raises it


def test_a_learned_scale_can_collapse_where_absmean_does_not():
    """A loss that wants the largest eighth of the weights larger: learned scales grow past all others."""
    ratios = {}
    for rule in ("absmean", "bounded", "learned"):
        linear = fake_linear(TernaryConfig(32, rule), 32, 64, perturb=False)
        weight = linear.parametrizations.weight
        nn.init.normal_(weight.original, generator=torch.Generator().manual_seed(0))
        if rule == "learned":
            start = TernaryWeight.from_float(weight.original, TernaryConfig(32)).scales.float()
            weight[0].scale.data.copy_(start)
        pull = weight.original.detach().sign() * (weight.original.detach().abs() > 1.5)
        optimizer = torch.optim.Adam(linear.parameters(), lr=0.05)
        for _ in range(50):
            (-(linear.weight * pull).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        ratios[rule] = FakeQuantize.packed(linear).zero_ratio()
    assert ratios["absmean"] < 0.5 < ratios["bounded"] < 0.8 < ratios["learned"]


@pytest.mark.parametrize("rule", TRAINED)
def test_trained_scales_are_state(rule):
    source, other = (nn.Sequential(fake_linear(TernaryConfig(32, rule), perturb=p)) for p in (True, False))
    key = f"0.parametrizations.weight.0.{TRAINED[rule]}"
    assert set(source.state_dict()) == {"0.parametrizations.weight.original", key}
    assert key in dict(source.named_parameters()) and not torch.equal(source[0].weight, other[0].weight)
    other.load_state_dict(source.state_dict())
    assert torch.equal(source[0].weight, other[0].weight)


@pytest.mark.parametrize("rule", TRAINED)
def test_rules_that_train_scales_do_not_round_a_dense_weight(rule):
    config = TernaryConfig(32, rule, modules=("0",))
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(ValueError, match=f"rule '{rule}' trains its scales: quantize_ and train the model"):
        pack_(model, config)
    assert isinstance(model[0], nn.Linear) and not hasattr(model[0], "parametrizations")
    with pytest.raises(ValueError, match=f"rule '{rule}' trains its scales, expected them beside"):
        TernaryWeight.from_float(model[0].weight, config)
    assert isinstance(pack_(quantize_(model, config))[0], TernaryLinear)


def test_a_sign_with_a_scale_and_a_shift_a_column():
    config = TernaryConfig(32, "shifted", modules=("0",))
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(nn.Linear(64, 8, bias=False)), config)
    latent, fake = model[0].parametrizations.weight.original, model[0].parametrizations.weight[0]
    with torch.no_grad():
        mean = latent.mean(0)
        torch.testing.assert_close(fake.shift, mean)
        torch.testing.assert_close(fake.scale, (latent - mean).abs().mean(0))
        fake.shift.add_(0.1)
    grad = torch.randn(8, 64)
    values = model[0].weight
    assert torch.equal(values, latent.sign() * fake.scale + fake.shift)
    found = torch.autograd.grad(values, (latent, fake.scale, fake.shift), grad)
    for a, b in zip(found, (grad, (grad * latent.sign()).sum(0), grad.sum(0)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="rule 'shifted' has no packed form, expected one of codes and"):
        pack_(model)
    with pytest.raises(ValueError, match="rule 'shifted' trains its scales: quantize_ and train"):
        pack_(nn.Sequential(nn.Linear(64, 8)), config)
