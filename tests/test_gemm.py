import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ternary_ssm  # noqa: F401
from ternary_ssm import reference

ops = torch.ops.ternary
gemm = ops.gemm
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# m, n, k, group; the CPU works on up to 6 rows, 32 columns and 256 weights at a time, on at most 128 rows
SIZES = [
    (1, 1, 4, 4), (1, 64, 128, 128), (2, 65, 256, 0), (3, 63, 128, 32), (4, 129, 384, 384), (5, 7, 96, 96),
    (6, 31, 512, 64), (7, 33, 192, 192), (12, 8, 100, 100), (13, 17, 1028, 1028), (144, 5, 64, 32),
    (145, 130, 160, 160), (300, 96, 256, 128), (0, 8, 32, 32), (8, 0, 32, 32), (1, 300, 2048, 128),
    (2, 34, 4, 4), (1, 33, 8, 8), (3, 32, 48, 48),
]  # fmt: skip


def problem(m, n, k, group, device="cpu", dtype=torch.float32, scale_dtype=torch.float16, bias=True):
    codes = reference.pack(torch.randint(-1, 2, (n, k), dtype=torch.int8)).to(device)
    scales = torch.rand((n, k // group) if group else (1, 1)).to(device, scale_dtype)
    x = torch.randn(m, k).to(device, dtype)
    return x, codes, scales, torch.randn(n).to(device, dtype) if bias else None


def rounded(x: Tensor, group: int) -> Tensor:
    """What a CPU multiplies: 16-bit integers with a scale for up to 128 columns of a group (0: a row)."""
    x, group = x.float(), group or x.shape[-1]
    widths = [min(128, group - i) for _ in range(x.shape[-1] // group) for i in range(0, group, 128)]
    parts = []
    for part in x.split(widths, -1):
        scale = (part.abs().amax(-1, keepdim=True) / 32639).clamp(min=2**-100)
        parts.append((part * (1 / scale)).clamp(-32639, 32639).round() * scale)
    return torch.cat(parts, -1)


def assert_is_reference(y: Tensor, group: int, args: tuple, activations: str = "a16"):
    """On a CPU x becomes the very same integers, so that fp32 sums alone differ."""
    x, codes, scales, bias = args
    x_float = rounded(x, group) if activations == "a16" else x.float()
    bias = None if bias is None else bias.float()
    expected = reference.gemm(x_float, codes, scales, bias, activations)
    assert (y.dtype, y.shape) == (x.dtype, expected.shape)
    if y.numel():
        weight = reference.dequantize(codes, scales, torch.float32).abs()
        sums = F.linear(x_float.abs(), weight, None if bias is None else bias.abs())
        limits = torch.finfo(x.dtype)
        bound = 4e-6 * sums + limits.eps * expected.abs() + limits.tiny
        assert ((y.float() - expected).abs() <= bound).all()


def assert_as_good_as_torch(y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None):
    """At most twice as far from float64 as torch is in x's dtype; a CPU than torch in 16 bits."""
    dtype = torch.float16 if x.device.type == "cpu" and x.dtype == torch.float32 else x.dtype
    weight = reference.dequantize(codes, scales, torch.float64)
    exact = F.linear(x.double(), weight, None if bias is None else bias.double())
    torch_y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    if y.numel():
        epsilon = torch.finfo(x.dtype).eps * exact.abs().max()
        error = (y.double() - exact).abs().max()
        assert error <= 2 * (torch_y.double() - exact).abs().max() + epsilon


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, k, group", SIZES)
def test_matches_reference(m, n, k, group, dtype, device):
    args = problem(m, n, k, group, device, dtype)
    assert_as_good_as_torch(gemm(*args), *args)
    if device == "cpu":
        return assert_is_reference(gemm(*args), group, args)
    expected, eps = reference.gemm(*args), torch.finfo(dtype).eps
    # with many rows of x in 16 bits a GPU rounds the weight to them, as torch does
    round_weight = m > 16 and dtype != torch.float32 and expected.numel()
    atol = eps * expected.abs().max().item() if round_weight else 1e-4
    torch.testing.assert_close(gemm(*args), expected, rtol=eps * 2, atol=atol)


def test_a_cpu_rounds_to_16_bits():
    x, *weight = problem(64, 96, 2048, 128, bias=False)
    x[:, :128] *= 1000  # what is large coarsens its own block alone
    exact = reference.gemm(x.double(), *weight)
    error = (gemm(x, *weight) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-5 < error < 4e-5  # max |x| / 32639 / sqrt(12) of normal x
    x[:, :128] = 0
    exact = reference.gemm(x.double(), *weight)
    assert (gemm(x, *weight) - exact).square().mean().sqrt() < 4e-5 * exact.square().mean().sqrt()


@pytest.mark.parametrize("m", [1, 5, 40])
def test_stays_accurate_over_long_rows(m, device):
    args = problem(m, 64, 8192, 8192, device, bias=False)
    assert_as_good_as_torch(gemm(*args), *args)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, "x"])
def test_takes_every_dtype(dtype, scale_dtype, bias_dtype, device):
    x, codes, scales, bias = problem(3, 65, 256, 128, device, dtype, scale_dtype)
    bias = None if bias_dtype is None else bias.to(dtype if bias_dtype == "x" else bias_dtype)
    assert_as_good_as_torch(gemm(x, codes, scales, bias), x, codes, scales, bias)


@pytest.mark.parametrize("leading", [(), (1,), (0, 3), (2, 1, 5)])
def test_takes_any_leading_dimensions(leading, device):
    _, *weight = problem(1, 65, 64, 32, device)
    x = torch.randn(*leading, 64, device=device)
    strided = torch.randn(64, *leading, device=device).movedim(0, -1)
    assert_as_good_as_torch(gemm(x, *weight), x, *weight)
    assert_as_good_as_torch(gemm(strided, *weight), strided, *weight)


def test_reads_invalid_codes_as_zero(device):
    x, codes, scales, _ = problem(9, 65, 128, 128, device, bias=False)
    codes = torch.randint_like(codes, 256)
    for rows in (x[:1], x):
        assert_as_good_as_torch(gemm(rows, codes, scales), rows, codes, scales, None)


def test_keeps_rows_apart(device):
    x, *weight = problem(160, 65, 192, 96, device)
    expected = gemm(x, *weight)
    x[[3, 150]] = float("nan")
    y = gemm(x, *weight)
    assert y[[3, 150]].isnan().all()
    y[[3, 150]] = expected[[3, 150]]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("m", [1, 7, 200])
def test_gives_the_same_bits_for_any_number_of_threads(m):
    args = problem(m, 700, 256, 128)
    before = torch.get_num_threads()
    results = []
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        results.append(gemm(*args))
    torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_same_bits_for_any_batch(dtype):
    x, *weight = problem(200, 130, 320, 160, dtype=dtype)
    y = gemm(x, *weight)
    for m in (1, 2, 3, 4, 5, 6, 7, 129, 145):
        assert torch.equal(gemm(x[:m], *weight), y[:m])
    assert torch.equal(gemm(x[199], *weight), y[199])


def test_every_isa(on_isa):
    torch.manual_seed(0)
    problems = [problem(*size, dtype=dtype) for size in SIZES for dtype in DTYPES]
    for i, y in enumerate(on_isa([("gemm", args) for args in problems])):
        assert_is_reference(y, SIZES[i // len(DTYPES)][3], problems[i])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_matches_reference(dtype, bias, device):
    x, codes, scales, b = problem(5, 65, 64, 32, device, dtype, bias=bias)
    x = x.reshape(5, 1, 64)
    inputs = [t.requires_grad_() for t in (x, b) if t is not None]
    dy = torch.randn(5, 1, 65, device=device).to(dtype)
    actual, expected = (
        torch.autograd.grad(f(x, codes, scales, b), inputs, dy) for f in (gemm, reference.gemm)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_is_a_good_citizen(bias, needs_grad, device):
    x, codes, scales, b = problem(5, 16, 64, 32, device, bias=bias)
    torch.library.opcheck(gemm.default, (x.requires_grad_(needs_grad), codes, scales, b))
    torch.library.opcheck(gemm.default, (x[0], codes, scales))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.ones(5, 64, dtype=torch.float64)), "x must be Float, BFloat16 or Half, not Double"),
        (dict(x=torch.ones(5, 60)), "x must have 64 columns (codes [16, 16]), not 60"),
        (dict(x=torch.tensor(1.0)), "x must have at least 1 dimension, not 0"),
        (dict(codes=torch.zeros(16, 16)), "codes must be Byte, not Float"),
        (dict(codes=torch.zeros(16, dtype=torch.uint8)), "codes must have 2 dimensions, not 1"),
        (dict(codes=torch.zeros(16, 16, dtype=torch.uint8).T), "codes must be contiguous"),
        (
            dict(scales=torch.ones(16, 2, dtype=torch.int32)),
            "scales must be Float, BFloat16 or Half, not Int",
        ),
        (dict(scales=torch.ones(2)), "scales must have 2 dimensions, not 1"),
        (dict(scales=torch.ones(15, 2)), "scales must be [16, groups] or [1, 1], not [15, 2]"),
        (dict(scales=torch.ones(16, 5)), "scales [16, 5] must cut the 64 weights of a row into equal groups"),
        (dict(scales=torch.ones(2, 16).T), "scales must be contiguous"),
        (dict(bias=torch.ones(15)), "bias must be [16], not [15]"),
        (dict(bias=torch.ones(16, 1)), "bias must be [16], not [16, 1]"),
        (dict(bias=torch.ones(16, dtype=torch.float16)), "bias must be Float as x is, or Float, not Half"),
        (dict(activations="int8"), "not int8"),
        (dict(activations=""), "activations must be a16"),
    ],
)
def test_refuses(change, message, device):
    args = dict(zip(("x", "codes", "scales", "bias"), problem(5, 16, 64, 32, device), strict=True))
    change = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in change.items()}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        gemm(**args | change)


@pytest.mark.parametrize("m", [0, 5])
def test_names_the_activations_of_a_device(m):
    x, codes, scales, bias = problem(m, 16, 64, 32)
    with pytest.raises(RuntimeError, match="activations must be a16 or a8 on a CPU, not fp8"):
        gemm(x, codes, scales, bias, "fp8")


def test_refuses_a_strided_bias(device):
    x, codes, scales, _ = problem(5, 16, 64, 32, device)
    with pytest.raises(RuntimeError, match="bias must be contiguous"):
        gemm(x, codes, scales, torch.ones(32, device=device)[::2])


# a8: x rounded to int8


SIZES_A8 = [
    *SIZES, (24, 17, 768, 128), (25, 16, 768, 256), (49, 15, 2048, 512), (3, 5, 4352, 64),
    (2, 33, 8192, 8192),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, k, group", SIZES_A8)
def test_a8_matches_reference(m, n, k, group, dtype):
    args = problem(m, n, k, group, dtype=dtype)
    assert_is_reference(gemm(*args, "a8"), group, args, "a8")
    args = problem(m, n, k, group, dtype=dtype, scale_dtype=torch.float32, bias=False)
    assert_is_reference(gemm(*args, "a8"), group, args, "a8")


def test_a8_costs_under_one_percent():
    x, *weight = problem(64, 96, 2048, 128, bias=False)
    exact = gemm(x, *weight)
    error = (gemm(x, *weight, "a8") - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0.005 < error < 0.01  # max |x| / 127 / sqrt(12) of normal x: rounded indeed, and no more than that


def test_a8_every_isa(on_isa):
    torch.manual_seed(0)
    problems = [problem(*size, dtype=dtype) for size in SIZES_A8 for dtype in DTYPES]
    calls = [("gemm", (*args, "a8")) for args in problems]
    for i, y in enumerate(on_isa(calls)):
        assert_is_reference(y, SIZES_A8[i // len(DTYPES)][3], problems[i], "a8")


def test_a8_gives_the_same_bits_for_any_batch_and_number_of_threads():
    x, *weight = problem(60, 300, 640, 160)
    before, results = torch.get_num_threads(), []
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            results.append(gemm(x, *weight, "a8"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)
    for m in (1, 2, 5, 6, 7, 23, 24, 25, 31):
        assert torch.equal(gemm(x[:m], *weight, "a8"), results[0][:m])


def test_a8_reads_invalid_codes_as_zero():
    x, codes, scales, _ = problem(9, 65, 128, 128, bias=False)
    args = x, torch.randint_like(codes, 256), scales, None
    assert_is_reference(gemm(*args, "a8"), 128, args, "a8")


@pytest.mark.parametrize("activations", ["a8", "a16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_cpu_gives_nan_for_what_is_not_finite(bad, activations):
    x, *weight = problem(30, 65, 192, 96)
    expected = gemm(x, *weight, activations)
    x[3, 0] = x[28, 191] = bad
    y = gemm(x, *weight, activations)
    assert y[[3, 28]].isnan().all() and gemm(x[3], *weight, activations).isnan().all()
    y[[3, 28]] = expected[[3, 28]]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("activations", ["a8", "a16"])
@pytest.mark.parametrize("size", [0, 1e-38, 1e-30, 1e37])
def test_a_cpu_takes_any_magnitude(size, activations):
    x, *weight = problem(3, 65, 128, 128, bias=False)
    args = x / x.abs().amax() * size, *weight
    assert_is_reference(gemm(*args, activations), 128, args, activations)


def test_a8_has_the_gradient_of_a16():
    x, *weight = problem(5, 65, 64, 32)
    x, dy = x.requires_grad_(), torch.randn(5, 65)
    a8, a16 = (torch.autograd.grad(gemm(x, *weight, kind), x, dy)[0] for kind in ("a8", "a16"))
    assert torch.equal(a8, a16)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("moved", ["codes", "scales", "bias"])
def test_refuses_two_devices(moved):
    args = dict(zip(("x", "codes", "scales", "bias"), problem(5, 16, 64, 32, "cuda"), strict=True))
    with pytest.raises(RuntimeError, match="must be on the first argument's device"):
        gemm(**args | {moved: args[moved].cpu()})
