"""The scan that projects its step sizes itself, with a dense weight and with a packed one."""

import pytest
import torch

import ternary_ssm  # noqa: F401
from recurrences import (
    FLOATS,
    assert_accurate,
    assert_accurate_on_isa,
    assert_equal,
    assert_gradients_match,
    assert_reference_gradients,
    assert_same_for_any_thread_count,
    check_citizen,
    packed,
    poisoned,
)
from ternary_ssm import reference
from test_selective_scan import problem as scan_problem
from test_selective_scan import ulps_of

fused = torch.ops.ternary.selective_scan_fused
ACTIVATIONS = ("x", "dt", "B", "C", "z")


def problem(b=2, l=6, d=8, n=3, rank=8, group=8, dtype=torch.float32, device="cpu", **options):
    """group: weights that share a scale, 0 for one scale, None for a dense weight."""
    made = scan_problem(b, l, d, n, dtype, device, **options)
    made["dt"] = torch.randn(b, l, rank).to(device, dtype)
    if group is None:
        made["dt_weight"], made["dt_scales"] = (torch.randn(d, rank) / rank).to(device, dtype), None
    else:
        made["dt_weight"] = reference.pack(torch.randint(-1, 2, (d, rank), dtype=torch.int8)).to(device)
        scales = torch.rand((d, rank // group) if group else (1, 1)) / rank**0.5
        made["dt_scales"] = scales.to(device, torch.float16)
    return made


# b, l, d, n, rank, group. The GPU's tiles have 32 tokens, 32 channels and 16 columns of dt.
SIZES = [
    (1, 1, 1, 1, 4, 4), (2, 6, 5, 3, 12, None), (1, 17, 64, 16, 8, 0), (2, 65, 24, 16, 48, 16),
    (1, 64, 16, 16, 128, 128), (1, 63, 8, 16, 24, None), (1, 130, 40, 16, 160, 32), (1, 20, 8, 16, 256, 64),
    (1, 9, 16, 16, 264, None), (1, 9, 16, 16, 40, 4), (0, 5, 8, 4, 8, 8), (2, 0, 8, 16, 16, 16),
    (2, 5, 0, 16, 8, 8), (1, 70, 16, 16, 24, 24), (1, 9, 48, 16, 56, 0), (1, 33, 40, 16, 136, 0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("b, l, d, n, rank, group", SIZES)
def test_matches_reference(b, l, d, n, rank, group, dtype, device):
    for state in (None, dtype):
        made = problem(b, l, d, n, rank, group, dtype, device, state=state)
        assert_accurate(fused, reference.selective_scan_fused, made, ulps_of(dtype, device))


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",)])
def test_matches_reference_with_options(without, scale_dtype, device):
    made = problem(1, 20, 16, 16, 32, 32, torch.bfloat16, device, state=torch.float32)
    made |= dict.fromkeys(without) | {"dt_scales": made["dt_scales"].to(scale_dtype)}
    assert_accurate(fused, reference.selective_scan_fused, made, ulps_of(torch.bfloat16, device))


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("lengths", [(7,), (0, 3, 0, 1, 65, 0), (0,)])
def test_matches_reference_on_packed_sequences(lengths, group, device):
    made = problem(1, sum(lengths), 24, 16, 64, group, torch.bfloat16, device, sequences=len(lengths))
    made = packed(made, lengths)
    assert_accurate(fused, reference.selective_scan_fused, made, ulps_of(torch.bfloat16, device))


@pytest.mark.parametrize("dtype", FLOATS)
def test_is_the_projection_and_the_scan(dtype, device):
    """The same as two operators in fp32, where dt is not rounded between them."""
    made = problem(1, 70, 24, 16, 32, 32, torch.float32, device)
    weight = (made.pop("dt_weight"), made.pop("dt_scales"))
    low = {k: made[k].to(dtype) for k in ACTIVATIONS}
    dt = reference.gemm(low["dt"].float(), *weight)
    options = {k: v.float() for k, v in low.items()} | {"dt": dt}
    expected = torch.ops.ternary.selective_scan(**(made | options))
    results = fused(**(made | low), dt_weight=weight[0], dt_scales=weight[1])
    for got, want in zip(results, expected, strict=True):
        tolerance = 2 * torch.finfo(got.dtype).eps + 4e-6
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def test_reads_slices_as_they_lie(device):
    made = problem(2, 6, 8, 16, 16, 16, device=device)
    assert_equal(fused(**poisoned(made, ACTIVATIONS, 2)), fused(**made))
    # As x_proj leaves them: dt, B and C side by side, and in whole pieces of 16 bytes.
    made = problem(2, 6, 8, 16, 16, 16, torch.bfloat16, device)
    whole = torch.cat([made[k] for k in ("dt", "B", "C")], dim=-1)
    parts = dict(zip(("dt", "B", "C"), whole.split([16, 16, 16], dim=-1), strict=True))
    assert_equal(fused(**(made | parts)), fused(**made))


def test_reads_invalid_codes_as_zero(device):
    made = problem(1, 9, 16, 16, 32, 32, torch.bfloat16, device)
    made["dt_weight"] = torch.randint_like(made["dt_weight"], 256)
    assert_accurate(fused, reference.selective_scan_fused, made, ulps_of(torch.bfloat16, device))


def test_every_instruction_set_matches_reference(on_isa):
    problems = [problem(2, 7, 66, 5, 24, group, dtype) for group in (None, 8, 0) for dtype in FLOATS]
    assert_accurate_on_isa(on_isa, fused, reference.selective_scan_fused, problems)


def test_same_bits_for_any_thread_count():
    assert_same_for_any_thread_count(fused, problem(3, 19, 321, 16, 12, 12, state=torch.float32))


@pytest.mark.parametrize("group", [None, 8])
def test_gradient_matches_reference(group, device):
    made = problem(group=group, device=device, state=torch.float32)
    made["dt_scales"] = None if group is None else made["dt_scales"].float()
    assert_gradients_match(fused, reference.selective_scan_fused, made)
    made = problem(1, 6, group=group, dtype=torch.bfloat16, device=device)
    assert_gradients_match(fused, reference.selective_scan_fused, packed(made, (2, 0, 4)))


def test_reference_gradient():
    assert_reference_gradients(reference.selective_scan_fused, problem(2, 3, 2, 2, 4, None))


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("group", [None, 8])
def test_is_a_good_citizen(group, needs_grad, device):
    check_citizen(fused, problem(group=group, device=device, state=torch.float32), needs_grad)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"x": p["x"][0]}, "x must have 3 dimensions, not 2"),
        (lambda p: {"x": p["x"].double()}, "x must be Float, BFloat16 or Half, not Double"),
        (lambda p: {"dt": p["dt"][:, :, :4]}, r"dt must be \[2, 6, 8\], not \[2, 6, 4\]"),
        (lambda p: {"dt": p["dt"].half()}, "dt must be Float, not Half"),
        (lambda p: {"dt_weight": p["dt_weight"][0]}, "dt_weight must have 2 dimensions, not 1"),
        (lambda p: {"dt_weight": p["dt_weight"].int()}, "dt_weight must be Byte, not Int"),
        (lambda p: {"dt_weight": p["dt_weight"][:7]}, r"dt_scales must be \[7, groups\] or \[1, 1\]"),
        (lambda p: {"dt_weight": p["dt_weight"][:, :0]}, "dt_weight must have at least one column"),
        (lambda p: {"dt_scales": p["dt_scales"].int()}, "dt_scales must be Float, BFloat16 or Half, not Int"),
        (lambda p: {"dt_scales": p["dt_scales"][:7]}, r"dt_scales must be \[8, groups\] or \[1, 1\]"),
        (lambda p: {"dt_scales": None}, "dt_weight must be Float, not Byte"),
        (lambda p: {"A": p["A"][0]}, "A must have 2 dimensions, not 1"),
    ],
)
def test_refuses(change, message):
    made = problem()
    with pytest.raises(RuntimeError, match=message):
        fused(**(made | change(made)))


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(8, 7), r"dt must be \[2, 6, 7\], not \[2, 6, 8\]"),
        (torch.ones(8, 0), "dt_weight must have at least one column"),
        (torch.ones(7, 8), r"dt_weight must be \[8, 8\], not \[7, 8\]"),
        (torch.ones(8, 8).half(), "dt_weight must be Float, not Half"),
    ],
)
def test_refuses_dense_weights(weight, message):
    with pytest.raises(RuntimeError, match=message):
        fused(**(problem(group=None) | {"dt_weight": weight}))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_refuses_too_many_states_on_a_gpu():
    with pytest.raises(RuntimeError, match="A must have at most 256 columns on a GPU, not 257"):
        fused(**problem(1, 2, 8, 257, device="cuda"))
