import pytest
import torch
import torch.nn.functional as F

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
    in_place,
    packed,
    poisoned,
    ulps,
)
from ternary_ssm import reference

conv = torch.ops.ternary.causal_conv1d
update = torch.ops.ternary.causal_conv1d_update


def problem(b=2, l=7, c=9, w=4, dtype=torch.float32, device="cpu", state=None, sequences=None):
    made = {
        "x": torch.randn(b, l, c, device=device).to(dtype),
        "weight": torch.randn(c, w, device=device),
        "bias": torch.randn(c, device=device),
    }
    if state:
        made["initial_state"] = torch.randn(sequences or b, w - 1, c, device=device).to(state)
    return made


def step_problem(b=2, c=9, w=4, dtype=torch.float32, device="cpu", state=torch.float32):
    made = problem(b, 1, c, w, dtype, device, state)
    state = made.pop("initial_state")
    return made | {"x": made["x"][:, 0], "state": state}


# Around the CPU's blocks of 64 channels and 32 tokens, the GPU's vectors of 2 or 4 channels and 16 tokens.
SIZES = [(1, 1, 1, 1), (2, 7, 9, 4), (1, 2, 64, 4), (3, 33, 65, 2), (1, 100, 130, 3), (2, 32, 63, 5)]
SIZES += [(1, 1, 8, 4), (3, 15, 72, 4), (2, 16, 8, 4), (2, 17, 136, 4), (1, 300, 24, 4), (1, 9, 16, 9)]
EMPTY = [(0, 5, 8, 4), (2, 0, 8, 4), (2, 5, 0, 4)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("b, l, c, w", SIZES + EMPTY)
def test_matches_reference(b, l, c, w, dtype, device):
    assert_accurate(conv, reference.causal_conv1d, problem(b, l, c, w, dtype, device))
    assert_accurate(conv, reference.causal_conv1d, problem(b, l, c, w, dtype, device, state=dtype))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("state", FLOATS)
def test_matches_reference_with_options(silu, state, device):
    made = problem(dtype=torch.bfloat16, device=device, state=state) | {"silu": silu, "bias": None}
    assert_accurate(conv, reference.causal_conv1d, made)
    made["weight"] = made["weight"].bfloat16()
    assert_accurate(conv, reference.causal_conv1d, made)


@pytest.mark.parametrize("lengths", [(7,), (0, 3, 0, 1, 33, 0), (0,)])
@pytest.mark.parametrize("state", [None, torch.float32])
def test_matches_reference_on_packed_sequences(lengths, state, device):
    made = packed(
        problem(1, sum(lengths), 70, 4, device=device, state=state, sequences=len(lengths)), lengths
    )
    assert_accurate(conv, reference.causal_conv1d, made)


@pytest.mark.parametrize("lengths", [(50,), (0, 3, 0, 1, 2, 16, 17, 0, 33, 15, 0), (0,), (1,) * 40])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
def test_vectors_of_packed_sequences(lengths, dtype, state, device):
    made = problem(1, sum(lengths), 136, 4, dtype, device, state, len(lengths))
    made["weight"] = made["weight"].to(dtype)
    made["bias"] = made["bias"].to(dtype)
    assert_accurate(conv, reference.causal_conv1d, packed(made, lengths))


@pytest.mark.parametrize("b, c, w", [(1, 1, 1), (2, 9, 4), (3, 130, 2), (1, 5, 5), (2, 3, 11), (0, 8, 4)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_update_matches_reference(b, c, w, dtype, device):
    made = step_problem(b, c, w, dtype, device, dtype)
    assert_accurate(in_place(update), in_place(reference.causal_conv1d_update), made)


def test_steps_equal_prefill(device):
    made = problem(2, 20, 70, 4, device=device, state=torch.float32)
    y, final_state = conv(**made)
    state = made.pop("initial_state").clone()
    x = made.pop("x")
    steps = [update(x=x[:, t], state=state, **made) for t in range(20)]
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-6, atol=1e-6)
    assert_equal([state], [final_state])


def test_reads_slices_as_they_lie(device):
    made = problem(2, 7, 9, device=device)
    assert_equal(conv(**poisoned(made, ("x",), 2)), conv(**made))
    made = step_problem(device=device)
    assert_equal(in_place(update)(**poisoned(made, ("x",), 1)), in_place(update)(**made))
    made = problem(2, 7, 9, device=device)
    assert_equal(conv(**(made | {"x": made["x"].mT.contiguous().mT})), conv(**made))


def test_silu_is_accurate(device):
    x = torch.cat([torch.linspace(-80, 80, 100_001), torch.logspace(-30, 0, 1001)]).to(device)
    y, _ = conv(x[:, None, None], torch.ones(1, 1, device=device))
    assert ulps(y.flatten(), F.silu(x.double())) < 4


def test_every_instruction_set_matches_reference(on_isa):
    problems = [
        problem(*size, dtype, state=dtype) for size in [(1, 7, 9, 4), (2, 33, 130, 3)] for dtype in FLOATS
    ]
    assert_accurate_on_isa(on_isa, conv, reference.causal_conv1d, problems)


def test_extreme_inputs_stay_finite(device):
    x = torch.tensor([-3e38, -1e4, -89, 0, 89, 1e4, 3e38], device=device)[None, :, None]
    y, _ = conv(x, torch.ones(1, 1, device=device))
    assert y.isfinite().all()


def test_same_bits_for_any_thread_count():
    assert_same_for_any_thread_count(conv, problem(3, 257, 321))


@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_gradient_matches_reference(outputs, device):
    made = problem(device=device, state=torch.float32)
    assert_gradients_match(conv, reference.causal_conv1d, made, outputs)
    made = packed(problem(1, 7, device=device), (3, 0, 4))
    assert_gradients_match(conv, reference.causal_conv1d, made, outputs)


def test_reference_gradient():
    assert_reference_gradients(reference.causal_conv1d, problem(2, 3, 2, 3, state=torch.float32))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_is_a_good_citizen(needs_grad, device):
    check_citizen(conv, problem(device=device, state=torch.float32), needs_grad)
    check_citizen(conv, problem(dtype=torch.bfloat16, device=device), needs_grad)


def test_packed_and_update_are_good_citizens(device):
    check_citizen(conv, packed(problem(1, 7, device=device), (3, 0, 4)))
    check_citizen(update, step_problem(device=device))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"x": p["x"][0]}, "x must have 3 dimensions, not 2"),
        (lambda p: {"x": p["x"].double()}, "x must be Float, BFloat16 or Half, not Double"),
        (lambda p: {"weight": p["weight"][0]}, "weight must have 2 dimensions, not 1"),
        (lambda p: {"weight": p["weight"][:8]}, r"weight must be \[9, 4\], not \[8, 4\]"),
        (lambda p: {"weight": p["weight"][:, :0]}, r"width of at least 1, not \[9, 0\]"),
        (lambda p: {"weight": p["weight"].half()}, "weight must be Float or x's Float, not Half"),
        (lambda p: {"bias": p["bias"][:8]}, r"bias must be \[9\], not \[8\]"),
        (lambda p: {"bias": p["bias"].half()}, "bias must be Float, not Half"),
        (lambda p: {"initial_state": p["x"][:, :2]}, r"initial_state must be \[2, 3, 9\], not \[2, 2, 9\]"),
        (
            lambda p: {"initial_state": p["x"][:, :3].double()},
            "initial_state must be Float, BFloat16 or Half",
        ),
        (
            lambda p: {"cu_seqlens": torch.tensor([0, 7]).int()},
            "x must have a batch of 1 beside cu_seqlens, not 2",
        ),
    ],
)
def test_refuses(change, message):
    made = problem()
    with pytest.raises(RuntimeError, match=message):
        conv(**(made | change(made)))


@pytest.mark.parametrize(
    "bounds, message",
    [
        (torch.tensor([0, 7]), "cu_seqlens must be Int, not Long"),
        (torch.tensor([[0, 7]]).int(), "cu_seqlens must have 1 dimensions, not 2"),
        (torch.tensor([7]).int(), "cu_seqlens must have at least 2 elements, not 1"),
        (torch.tensor([1, 7]).int(), "cu_seqlens must start at 0, not 1"),
        (torch.tensor([0, 6]).int(), "cu_seqlens must end at x's length 7, not 6"),
        (torch.tensor([0, 8]).int(), "cu_seqlens must end at x's length 7, not 8"),
        (torch.tensor([0, 5, 3, 7]).int(), "cu_seqlens must not decrease, but goes from 5 to 3"),
    ],
)
def test_refuses_bounds(bounds, message):
    with pytest.raises(RuntimeError, match=message):
        conv(**problem(1), cu_seqlens=bounds)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"x": p["x"][None]}, "x must have 2 dimensions, not 3"),
        (lambda p: {"state": p["state"][:1]}, r"state must be \[2, 3, 9\], not \[1, 3, 9\]"),
        (lambda p: {"state": p["state"].mT.contiguous().mT}, "state must be contiguous"),
        (lambda p: {"state": p["state"].double()}, "state must be Float, BFloat16 or Half, not Double"),
    ],
)
def test_update_refuses(change, message):
    made = step_problem()
    with pytest.raises(RuntimeError, match=message):
        update(**(made | change(made)))
