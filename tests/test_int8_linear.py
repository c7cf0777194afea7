import re

import pytest
import torch
from torch import Tensor

import ternary_ssm  # noqa: F401
from ternary_ssm import reference

int8_linear = torch.ops.ternary.int8_linear
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# m, n, k; the CPU works on 4 rows of x, 64 of the table and vectors of at most 16 elements
SIZES = [
    (1, 1, 1), (1, 64, 128), (2, 65, 100), (3, 63, 31), (4, 130, 256), (5, 3, 17), (9, 66, 768), (1, 5, 15),
    (0, 8, 32), (8, 0, 32), (1, 200, 2048),
]  # fmt: skip


def problem(m, n, k, device="cpu", dtype=torch.float32, scale_dtype=torch.float16):
    table = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return torch.randn(m, k).to(device, dtype), table.to(device), torch.rand(n, 1).to(device, scale_dtype)


def assert_close(y: Tensor, x: Tensor, table: Tensor, scale: Tensor, ulps: float = 1):
    """Products and sums are fp32 whatever x is; the result is rounded once."""
    exact = reference.int8_linear(x.double(), table, scale)
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    if y.numel():
        sums = reference.int8_linear(x.double().abs(), table.abs(), scale)
        bound = sums * x.shape[-1] ** 0.5 * 2**-22 + exact.abs() * ulps * torch.finfo(x.dtype).eps
        assert ((y.double() - exact).abs() <= bound + torch.finfo(x.dtype).tiny).all()


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, k", SIZES)
def test_matches_reference(m, n, k, dtype, scale_dtype):
    args = problem(m, n, k, dtype=dtype, scale_dtype=scale_dtype)
    assert_close(int8_linear(*args), *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_either_device(dtype, device):
    args = problem(3, 9000, 64, device, dtype)  # on a GPU more rows than are widened at once
    expected = reference.int8_linear(*args)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        int8_linear(*args), expected, rtol=tolerance, atol=tolerance * expected.abs().max()
    )


@pytest.mark.parametrize("leading", [(), (1,), (0, 3), (2, 1, 5)])
def test_takes_any_leading_dimensions(leading):
    _, *weight = problem(1, 65, 40)
    x = torch.randn(*leading, 40)
    assert_close(int8_linear(x, *weight), x, *weight)
    strided = torch.randn(40, *leading).movedim(0, -1)
    assert_close(int8_linear(strided, *weight), strided, *weight)


def test_gives_the_same_bits_for_any_batch_and_number_of_threads():
    x, *weight = problem(9, 700, 200)
    before, results = torch.get_num_threads(), []
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            results.append(int8_linear(x, *weight))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)
    assert all(torch.equal(int8_linear(x[m], *weight), results[0][m]) for m in range(9))


def test_keeps_rows_apart():
    x, table, scale = problem(6, 70, 33)
    expected = int8_linear(x, table, scale)
    x[3] = float("nan")
    scale[5] = float("nan")
    y = int8_linear(x, table, scale)
    assert y[3].isnan().all() and y[:, 5].isnan().all()
    y[3], y[:, 5] = expected[3], expected[:, 5]
    assert torch.equal(y, expected)


def test_every_isa(on_isa):
    torch.manual_seed(0)
    problems = [problem(*size, dtype=dtype) for size in SIZES for dtype in DTYPES]
    calls = [("int8_linear", args) for args in problems]
    for y, args in zip(on_isa(calls), problems, strict=True):
        assert_close(y, *args)


def test_gradient_matches_reference():
    x, *weight = problem(5, 65, 64)
    x = x.reshape(5, 1, 64).requires_grad_()
    dy = torch.randn(5, 1, 65)
    actual, expected = (
        torch.autograd.grad(f(x, *weight), x, dy) for f in (int8_linear, reference.int8_linear)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_is_a_good_citizen(needs_grad, device):
    x, *weight = problem(5, 16, 64, device)
    torch.library.opcheck(int8_linear.default, (x.requires_grad_(needs_grad), *weight))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.ones(5, 64, dtype=torch.float64)), "x must be Float, BFloat16 or Half, not Double"),
        (dict(x=torch.ones(5, 60)), "x must have 64 columns, at least 1 (table [16, 64]), not 60"),
        (dict(x=torch.tensor(1.0)), "x must have at least 1 dimension, not 0"),
        (dict(table=torch.zeros(16, 64)), "table must be Char, not Float"),
        (dict(table=torch.zeros(16, dtype=torch.int8)), "table must have 2 dimensions, not 1"),
        (dict(table=torch.zeros(64, 16, dtype=torch.int8).T), "table must be contiguous"),
        (dict(scale=torch.ones(16)), "scale must be [16, 1], not [16]"),
        (dict(scale=torch.ones(16, 1).int()), "scale must be Float, BFloat16 or Half, not Int"),
    ],
)
def test_refuses(change, message):
    args = dict(zip(("x", "table", "scale"), problem(5, 16, 64), strict=True))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        int8_linear(**args | change)
