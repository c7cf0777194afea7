"""rms_norm_gated and add_rms_norm."""

import re

import pytest
import torch

import ternary_ssm  # noqa: F401
from recurrences import (
    FLOATS,
    assert_accurate,
    assert_gradients_match,
    assert_reference_gradients,
    assert_same_for_any_thread_count,
    check_citizen,
    poisoned,
)
from ternary_ssm import reference

gated = torch.ops.ternary.rms_norm_gated
add = torch.ops.ternary.add_rms_norm


def as_tuple(function):
    return lambda **problem: (function(**problem),)


def in_place(function):
    """add_rms_norm as a function: (y, new residual), the residual given left as it was."""

    def run(**problem):
        residual = problem.pop("residual").clone()
        return function(residual=residual, **problem), residual

    return run


def gated_problem(lead=(3,), d=24, groups=1, before=False, dtype=torch.float32, weight=None, device="cpu"):
    made = {
        "y": torch.randn(*lead, d).to(dtype),
        "z": torch.randn(*lead, d).to(dtype),
        "weight": torch.randn(d).to(weight or dtype),
    }
    made = {k: v.to(device) for k, v in made.items()}
    return made | {"groups": groups, "eps": 1e-5, "norm_before_gate": before}


def add_problem(lead=(3,), d=24, dtype=torch.float32, residual=torch.float32, weight=None, device="cpu"):
    made = {
        "x": torch.randn(*lead, d).to(dtype),
        "residual": torch.randn(*lead, d).to(residual),
        "weight": torch.randn(d).to(weight or dtype),
    }
    return {k: v.to(device) for k, v in made.items()} | {"eps": 1e-5}


# The GPU reads runs of 8, and up to 6144 elements a part once.
SIZES = [((1,), 1), ((2, 3), 7), ((5,), 8), ((1, 2), 264), ((64,), 130), ((2,), 4096), ((2,), 4097)]
SIZES += [((2,), 6144), ((1,), 6152), ((300,), 12)]
EMPTY = [((0,), 8), ((2, 0), 8), ((3,), 0)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("lead, d", SIZES + EMPTY)
def test_gated_matches_reference(lead, d, before, dtype, device):
    made = gated_problem(lead, d, 1, before, dtype, device=device)
    assert_accurate(as_tuple(gated), as_tuple(reference.rms_norm_gated), made)


@pytest.mark.parametrize("weight", FLOATS)
@pytest.mark.parametrize("d, groups", [(6, 2), (48, 3), (2048, 8), (9 * 1032, 9), (20000, 2)])
def test_gated_matches_reference_in_groups(d, groups, weight, device):
    made = gated_problem((2, 2), d, groups, False, torch.bfloat16, weight, device)
    assert_accurate(as_tuple(gated), as_tuple(reference.rms_norm_gated), made)


@pytest.mark.parametrize("residual", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead, d", SIZES + EMPTY)
def test_add_matches_reference(lead, d, dtype, residual, device):
    made = add_problem(lead, d, dtype, residual, device=device)
    assert_accurate(in_place(add), in_place(reference.add_rms_norm), made)


@pytest.mark.parametrize("weight", FLOATS)
def test_add_returns_the_dtype_of_the_weight(weight, device):
    made = add_problem((3,), 40, torch.bfloat16, torch.float32, weight, device)
    assert_accurate(in_place(add), in_place(reference.add_rms_norm), made)


def test_norms_what_is_stored(device):
    """A residual of 16 bits is rounded before the norm: another call that adds nothing gives the same."""
    made = add_problem((4,), 72, torch.bfloat16, torch.bfloat16, device=device)
    y = add(**made)
    assert torch.equal(add(**(made | {"x": torch.zeros_like(made["x"])})), y)


@pytest.mark.parametrize("tokens", [1, 2])
def test_reads_slices_as_they_lie(tokens, device):
    for dtype in FLOATS:
        made = gated_problem((3, 5)[:tokens], 32, dtype=dtype, device=device)
        expected = gated(**made)
        whole = torch.cat([made["z"], made["y"]], dim=-1)  # 16 bytes at a time
        z, y = whole.chunk(2, dim=-1)
        assert torch.equal(gated(**(made | {"y": y, "z": z})), expected)
        torch.testing.assert_close(gated(**poisoned(made, ("y", "z"), tokens)), expected)
        made = add_problem((3, 5)[:tokens], 32, dtype, device=device)
        pairs = zip(in_place(add)(**poisoned(made, ("x",), tokens)), in_place(add)(**made), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want)


def test_writes_no_other_row(device):
    made = add_problem((4,), 40, torch.bfloat16, device=device)
    around = torch.full((6, 40), torch.nan, device=device)
    around[1:-1] = made["residual"]
    y = add(**(made | {"residual": around[1:-1]}))
    assert torch.equal(y, add(**made)) and torch.equal(around[1:-1], made["residual"])
    assert around[[0, -1]].isnan().all()


def test_extreme_gates_stay_finite(device):
    made = gated_problem((2,), 16, device=device)
    made["z"] = torch.tensor([-3e38, -100.0, 0.0, 100.0], device=device).repeat(2, 4)
    for before in (False, True):
        assert gated(**(made | {"norm_before_gate": before})).isfinite().all()


def test_every_instruction_set_matches_reference(on_isa):
    problems = [gated_problem((3,), 51, 3, before, dtype) for before in (False, True) for dtype in FLOATS]
    schema = gated.default._schema
    calls = [("rms_norm_gated", [p[a.name] for a in schema.arguments]) for p in problems]
    for result, made in zip(on_isa(calls), problems, strict=True):
        assert_accurate(lambda result=result, **_: (result,), as_tuple(reference.rms_norm_gated), made)
    made = add_problem((3,), 51)
    (y,) = on_isa([("add_rms_norm", [made["x"], made["residual"].clone(), made["weight"], 1e-5])])
    torch.testing.assert_close(y, in_place(reference.add_rms_norm)(**made)[0])


def test_same_bits_for_any_thread_count():
    assert_same_for_any_thread_count(as_tuple(gated), gated_problem((200,), 520, 4))
    assert_same_for_any_thread_count(in_place(add), add_problem((200,), 520))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("before", [False, True])
def test_gradient_matches_reference(before, dtype, device):
    made = gated_problem((2, 3), 24, 3, before, dtype, torch.float32, device)
    assert_gradients_match(as_tuple(gated), as_tuple(reference.rms_norm_gated), made, (0,))


def test_reference_gradient():
    for before in (False, True):
        assert_reference_gradients(reference.rms_norm_gated, gated_problem((2,), 6, 2, before))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_gated_is_a_good_citizen(needs_grad, device):
    check_citizen(gated, gated_problem((2, 3), device=device), needs_grad)


def test_add_is_a_good_citizen(device):
    check_citizen(add, add_problem((2, 3), device=device))


@pytest.mark.parametrize("name", ["x", "residual", "weight"])
def test_add_refuses_gradients(name, device):
    made = add_problem(device=device)
    made[name] = made[name].requires_grad_()
    with pytest.raises(RuntimeError, match="add_rms_norm has no gradient"):
        add(**made)
    with torch.no_grad():
        add(**made)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(y=torch.ones(24)), "y must have 2 or 3 dimensions, not 1"),
        (dict(y=torch.ones(3, 24).double()), "y must be Float, BFloat16 or Half, not Double"),
        (dict(z=torch.ones(3, 23)), "z must be [3, 24], not [3, 23]"),
        (dict(z=torch.ones(3, 24).half()), "z must be Float, not Half"),
        (dict(weight=torch.ones(23)), "weight must be [24], not [23]"),
        (dict(weight=torch.ones(24).int()), "weight must be Float, BFloat16 or Half, not Int"),
        (dict(groups=0), "groups must divide the 24 columns of y, not be 0"),
        (dict(groups=5), "groups must divide the 24 columns of y, not be 5"),
    ],
)
def test_gated_refuses(change, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        gated(**(gated_problem() | change))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.ones(1, 1, 3, 24)), "x must have 2 or 3 dimensions, not 4"),
        (dict(x=torch.ones(3, 24).int()), "x must be Float, BFloat16 or Half, not Int"),
        (dict(residual=torch.ones(2, 24)), "residual must be [3, 24], not [2, 24]"),
        (dict(residual=torch.ones(24, 3).T), "residual must be contiguous"),
        (dict(residual=torch.ones(3, 24).double()), "residual must be Float, BFloat16 or Half, not Double"),
        (dict(weight=torch.ones(1, 24)), "weight must be [24], not [1, 24]"),
        (dict(weight=torch.ones(24).double()), "weight must be Float, BFloat16 or Half, not Double"),
    ],
)
def test_add_refuses(change, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        add(**(add_problem() | change))
