import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

import ternary_ssm  # noqa: F401
from ternary_ssm import reference

ops = torch.ops.ternary
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 4, 0),
    (1, 4, 4),
    (3, 12, 12),
    (7, 64, 32),
    (5, 288, 96),
    (33, 384, 128),
    (2, 1028, 0),
    (9, 256, 256),
]


def assert_equal(actual, expected) -> None:
    """The same dtype, shape and bits, tensors or tuples of them."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k, group", SHAPES)
def test_quantize_matches_reference(n, k, group, dtype, scale_dtype, device):
    weight = torch.randn(n, k, device=device).to(dtype)
    assert_equal(ops.quantize(weight, group, scale_dtype), reference.quantize(weight, group, scale_dtype))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_quantize_matches_reference_anywhere(data):
    """From subnormal weights to scales that overflow their dtype.

    Weights of very different size can leave a mean so near the middle of two scales that the order of the
    sum, in float64, decides between them.
    """
    n, k, group = data.draw(st.sampled_from([(1, 4, 4), (2, 4, 0), (3, 64, 32), (2, 64, 64)]))
    width = data.draw(st.sampled_from([16, 32]))
    finite = st.floats(width=width, allow_nan=False, allow_infinity=False)
    weight = torch.from_numpy(data.draw(arrays(np.dtype(f"float{width}"), (n, k), elements=finite)))
    scale_dtype = data.draw(st.sampled_from(DTYPES))
    expected = reference.quantize(weight, group, scale_dtype)
    if expected[1].isfinite().all():
        codes, scales = ops.quantize(weight, group, scale_dtype)
        kind = torch.finfo(scale_dtype)
        subnormal = kind.smallest_normal * kind.eps
        torch.testing.assert_close(scales, expected[1], rtol=kind.eps, atol=subnormal)
        if torch.equal(scales, expected[1]):
            assert_equal(codes, expected[0])
        for dtype in DTYPES:
            assert_equal(ops.dequantize(*expected, dtype), reference.dequantize(*expected, dtype))
    else:
        with pytest.raises(RuntimeError, match="is too large for"):
            ops.quantize(weight, group, scale_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("n, k, group", SHAPES)
def test_fake_quantize_is_what_packing_stores(n, k, group, scale_dtype, dtype, device):
    latent = torch.randn(n, k, device=device)
    weight = ops.fake_quantize(latent, group, scale_dtype, dtype)
    assert_equal(weight, reference.fake_quantize(latent, group, scale_dtype, dtype))
    assert_equal(weight, ops.dequantize(*ops.quantize(latent, group, scale_dtype), dtype))
    shifted = torch.empty(n * k + 1, device=device)[1:].view(n, k).copy_(latent)  # not aligned to 16 bytes
    assert_equal(ops.fake_quantize(shifted, group, scale_dtype, dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k", [(0, 8), (1, 1), (3, 33), (5, 2048), (4, 4096), (2, 4104), (2, 10000)])
def test_quantize_fp8_matches_reference(m, k, dtype, device):
    x = torch.randn(m, k, device=device).to(dtype)
    x[1:2] = 0
    x[2:3, ::2] *= 2**-14
    q, scale = ops.quantize_fp8(x)
    expected, expected_scale = reference.quantize_fp8(x)
    assert q.dtype == torch.float8_e4m3fn
    assert_equal((q.view(torch.uint8), scale), (expected.view(torch.uint8), expected_scale))
    if m:
        x[-1, k // 2] = math.nan
        q, scale = ops.quantize_fp8(x)
        assert scale.isnan().flatten().tolist() == [False] * (m - 1) + [True]
        assert q[-1].float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_fake_quantize_is_the_identity(dtype, device):
    latent = torch.randn(5, 128, device=device).requires_grad_()
    factor = torch.randn(5, 128, device=device)

    def loss(latent):
        return (ops.fake_quantize(latent, 64, torch.float16, dtype) * factor.to(dtype)).sum()

    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        latent.grad = None
        function(latent).backward()
        assert_equal(latent.grad, factor.to(dtype).float())


def test_quantize_by_hand(device):
    """Half of the scale, exactly, rounds to 0; a group of zeros has scale 0."""
    weight = torch.tensor([8 * [3.0, -3, 1, -1] + 32 * [0.0]], device=device)
    codes, scales = ops.quantize(weight, 32, torch.float16)
    assert scales.tolist() == [[2, 0]]
    assert ops.unpack(codes).tolist() == [8 * [1, -1, 0, 0] + 32 * [0]]


def test_quantize_takes_views_and_any_number_of_threads(device):
    weight = torch.randn(513, 65, device=device).T[1:]  # [64, 513]
    weight = weight[:, 1:]
    before = torch.get_num_threads()
    for group in (0, 32, 512):
        expected = reference.quantize(weight, group, torch.float16)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert_equal(ops.quantize(weight, group, torch.float16), expected)
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 40_000])
def test_first_invalid(size):
    codes = torch.tensor([0b11010011, 0b01110001], dtype=torch.uint8).repeat(size)[:size]
    assert ops.first_invalid(codes) == reference.first_invalid(codes) == -1
    for place in sorted({4 * size - 1, 4 * (size // 2) + 2, 1, 0}, reverse=True):
        codes[place // 4] = codes[place // 4] & ~(3 << place % 4 * 2) | 2 << place % 4 * 2
        assert ops.first_invalid(codes) == reference.first_invalid(codes) == place


@given(arrays(np.uint8, st.tuples(st.integers(0, 5), st.integers(1, 70))))
@settings(deadline=None)
def test_unpack_and_pack_match_reference(codes):
    codes = torch.from_numpy(codes)
    ternary = ops.unpack(codes)
    assert_equal(ternary, reference.unpack(codes))
    valid = ops.pack(ternary)
    assert_equal(valid, reference.pack(ternary))
    assert_equal(ops.unpack(valid), ternary)
    invalid = (codes & 0xAA) & ~(codes << 1)
    assert_equal(valid, codes & ~invalid)


def test_layout(device):
    assert ops.pack(torch.tensor([[0, 1, -1, 0, 1, 1, 1, -1]], dtype=torch.int8, device=device)).tolist() == [
        [0b00_11_01_00, 0b11_01_01_01]
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("n, k, group", SHAPES)
def test_dequantize_matches_reference(n, k, group, scale_dtype, dtype, device):
    codes = torch.randint(0, 256, (n, k // 4), dtype=torch.uint8, device=device)  # invalid codes among them
    scales = torch.randn((n, k // group) if group else (1, 1), device=device).to(scale_dtype)
    assert_equal(ops.dequantize(codes, scales, dtype), reference.dequantize(codes, scales, dtype))


def test_no_rows(device):
    assert_equal(
        ops.quantize(torch.empty(0, 64, device=device), 32, torch.float16),
        (
            torch.empty(0, 16, dtype=torch.uint8, device=device),
            torch.empty(0, 2, dtype=torch.float16, device=device),
        ),
    )
    codes = torch.empty(0, 16, dtype=torch.uint8, device=device)
    assert ops.pack(ops.unpack(codes)).shape == (0, 16)
    empty = ops.fake_quantize(torch.empty(0, 64, device=device), 32, torch.float16, torch.bfloat16)
    assert empty.shape == (0, 64) and empty.dtype == torch.bfloat16
    assert ops.dequantize(codes, torch.empty(0, 2, device=device), torch.float32).shape == (0, 64)


def test_every_isa_matches_reference(on_isa):
    torch.manual_seed(0)
    calls = []
    for n, k, group in SHAPES:
        for dtype in DTYPES:
            weight = torch.randn(n, k).to(dtype)
            codes, scales = reference.quantize(weight, group, dtype)
            calls += [("quantize", (weight, group, dtype)), ("dequantize", (codes, scales, dtype))]
            calls += [("fake_quantize", (weight.float(), group, torch.float16, dtype))]
        calls += [("unpack", (codes,)), ("pack", (reference.unpack(codes),))]
    assert_equal(on_isa(calls), [getattr(reference, name)(*args) for name, args in calls])


def test_refuses_an_unknown_isa():
    script = "import torch, ternary_ssm; torch.ops.ternary.unpack(torch.zeros(1, 1, dtype=torch.uint8))"
    environment = os.environ | {"TERNARY_CPU_ISA": "sse9"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "TERNARY_CPU_ISA is 'sse9', expected one of portable, avx2, avx512" in run.stderr


def poisoned(value: float, dtype=torch.float32) -> Tensor:
    weight = torch.ones(5, 64, dtype=dtype)
    weight[2, 37] = weight[4, 1] = value
    return weight


W, I8 = torch.ones(4, 64), torch.ones(4, 64, dtype=torch.int8)
CODES, SCALES = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 2)


GROUPS = "divides the 64 columns of weight, or 64 (one scale a row), or 0 (one for all)"
F32, F16, F64 = torch.float32, torch.float16, torch.float64
REFUSED = [
    ("quantize", (W.double(), 32, F16), "weight must be Float, BFloat16 or Half, not Double"),
    ("quantize", (W, 32, F64), "scale_dtype must be Float, BFloat16 or Half, not Double"),
    ("quantize", (W[0], 32, F16), "weight must have 2 dimensions, not 1"),
    ("quantize", (W[:, :0], 0, F16), "weight must have a positive multiple of 4 columns, not 0"),
    ("quantize", (W[:, :62], 62, F16), "weight must have a positive multiple of 4 columns, not 62"),
    ("quantize", (W[:0], 0, F16), "weight must have a row to take the scale from, not [0, 64]"),
    *(("quantize", (W, group, F16), f"{GROUPS}, not {group}") for group in (-32, 1, 16, 48, 128)),
    ("fake_quantize", (W.bfloat16(), 32, F16, F32), "latent must be Float, not BFloat16"),
    ("fake_quantize", (W[0], 32, F16, F32), "latent must have 2 dimensions, not 1"),
    (
        "fake_quantize",
        (W, 48, F16, F32),
        "columns of latent, or 64 (one scale a row), or 0 (one for all), not 48",
    ),
    ("fake_quantize", (W, 32, F64, F32), "scale_dtype must be Float, BFloat16 or Half, not Double"),
    ("fake_quantize", (W, 32, F16, F64), "dtype must be Float, BFloat16 or Half, not Double"),
    ("pack", (I8.int(),), "ternary must be Char, not Int"),
    ("pack", (I8[0],), "ternary must have 2 dimensions, not 1"),
    ("pack", (I8[:, :6],), "ternary must have a positive multiple of 4 columns, not 6"),
    ("unpack", (CODES.char(),), "codes must be Byte, not Char"),
    ("unpack", (CODES[0],), "codes must have 2 dimensions, not 1"),
    ("unpack", (CODES.T,), "codes must be contiguous"),
    ("dequantize", (CODES, SCALES, F64), "dtype must be Float, BFloat16 or Half, not Double"),
    ("dequantize", (CODES, SCALES.double(), F32), "scales must be Float, BFloat16 or Half, not Double"),
    ("dequantize", (CODES, SCALES[0], F32), "scales must have 2 dimensions, not 1"),
    ("dequantize", (CODES, SCALES[:3], F32), "scales must be [4, groups] or [1, 1], not [3, 2]"),
    ("dequantize", (CODES, SCALES[:1], F32), "scales must be [4, groups] or [1, 1], not [1, 2]"),
    *(
        (
            "dequantize",
            (CODES, torch.ones(4, groups), F32),
            f"scales [4, {groups}] must cut the 64 weights of a row",
        )
        for groups in (0, 3, 32)
    ),
    ("dequantize", (CODES, torch.ones(2, 4).T, F32), "scales must be contiguous"),
    ("dequantize", (CODES[:, :0], SCALES, F32), "codes must have at least one column, not [4, 0]"),
]


REFUSED_VALUES = [
    *(
        ("quantize", (poisoned(value, dtype), group, F16), "weight[2, 37] is not finite")
        for value in (math.nan, math.inf, -math.inf)
        for dtype in DTYPES
        for group in (0, 32, 64)
    ),
    ("fake_quantize", (poisoned(math.nan), 32, F16, F32), "latent[2, 37] is not finite"),
    ("fake_quantize", (poisoned(1e30), 0, F16, F32), "that starts at latent[0, 0] is too large for Half"),
    ("quantize", (poisoned(1e30), 32, F16), "group of 32 that starts at weight[2, 32] is too large for Half"),
    ("quantize", (poisoned(1e30), 0, F16), "group of 320 that starts at weight[0, 0] is too large for Half"),
    *(
        ("pack", (poisoned(value, torch.int8),), f"ternary[2, 37] must be -1, 0 or 1, not {value}")
        for value in (2, -2, 127, -128)
    ),
]


@pytest.mark.parametrize("op, args, message", REFUSED_VALUES)
def test_refuses_values_on_the_cpu(op, args, message):
    """A GPU could refuse them only by making the host wait: test_cuda.py says what it does instead."""
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(ops, op)(*args)


@pytest.mark.parametrize("op, args, message", REFUSED)
def test_refuses(op, args, message, device):
    args = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(ops, op)(*args)


@pytest.mark.parametrize(
    "op, args",
    [
        ("quantize", (W, 32, torch.float16)),
        ("quantize", (W, 0, torch.bfloat16)),
        ("fake_quantize", (W, 32, torch.float16, torch.bfloat16)),
        ("quantize_fp8", (W,)),
        ("fake_quantize", (W.clone().requires_grad_(), 0, torch.float16, torch.float32)),
        ("pack", (I8,)),
        ("unpack", (CODES,)),
        ("dequantize", (CODES, SCALES, torch.bfloat16)),
    ],
)
def test_is_a_good_citizen(op, args, device):
    args = [
        a.to(device).detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
    ]
    torch.library.opcheck(getattr(ops, op).default, args)
