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

scan = torch.ops.ternary.selective_scan
update = torch.ops.ternary.selective_scan_update
ACTIVATIONS = ("x", "dt", "B", "C", "z")


def ulps_of(dtype: torch.dtype, device: str) -> int:
    """Units of the last place of fp32 that states may err by: with 16-bit activations a GPU takes
    exponentials good to two of them, whose errors add up over the tokens that a state remembers."""
    return 4 if device == "cpu" or dtype == torch.float32 else 16


def problem(b=2, l=6, d=5, n=3, dtype=torch.float32, device="cpu", state=None, sequences=None):
    made = {
        "x": torch.randn(b, l, d).to(dtype),
        "dt": torch.randn(b, l, d).to(dtype),
        "A": -16 * torch.rand(d, n),
        "B": torch.randn(b, l, n).to(dtype),
        "C": torch.randn(b, l, n).to(dtype),
        "D": torch.randn(d),
        "z": torch.randn(b, l, d).to(dtype),
        "dt_bias": torch.randn(d) - 2,
    }
    if state:
        made["initial_state"] = torch.randn(sequences or b, d, n).to(state)
    return {k: v.to(device) for k, v in made.items()}


def step_problem(b=2, d=5, n=3, dtype=torch.float32, device="cpu", state=torch.float32):
    made = problem(b, 1, d, n, dtype, device, state)
    state = made.pop("initial_state")
    return made | {k: made[k][:, 0] for k in ACTIVATIONS} | {"state": state}


SIZES = [(1, 1, 1, 1), (2, 6, 5, 3), (1, 17, 64, 16), (3, 5, 65, 16), (1, 40, 130, 17), (2, 3, 7, 64)]
# The GPU's tiles have 32 tokens and 32 channels of a state size of 16.
SIZES += [(2, 64, 32, 16), (1, 31, 8, 16), (2, 33, 40, 16)]
SIZES += [(1, 63, 8, 16), (2, 65, 24, 16), (1, 130, 40, 16), (1, 33, 2, 256)]
EMPTY = [(0, 5, 8, 4), (2, 0, 8, 16), (2, 5, 0, 4), (2, 5, 3, 0)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("b, l, d, n", SIZES + EMPTY)
def test_matches_reference(b, l, d, n, dtype, device):
    for made in (problem(b, l, d, n, dtype, device), problem(b, l, d, n, dtype, device, state=dtype)):
        assert_accurate(scan, reference.selective_scan, made, ulps_of(dtype, device))


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("dt_softplus", [True, False])
def test_matches_reference_with_options(without, dt_softplus, device):
    made = problem(dtype=torch.bfloat16, device=device, state=torch.float32) | dict.fromkeys(without)
    made |= {"dt_softplus": dt_softplus}
    assert_accurate(scan, reference.selective_scan, made, ulps_of(torch.bfloat16, device))


@pytest.mark.parametrize("lengths", [(7,), (0, 3, 0, 1, 33, 0), (0,)])
@pytest.mark.parametrize("state", [None, torch.float32, torch.float16])
def test_matches_reference_on_packed_sequences(lengths, state, device):
    made = problem(1, sum(lengths), 70, 16, device=device, state=state, sequences=len(lengths))
    assert_accurate(scan, reference.selective_scan, packed(made, lengths))


@pytest.mark.parametrize("b, d, n", [(1, 1, 1), (2, 5, 3), (3, 65, 16), (1, 8, 17), (0, 8, 4)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("state", FLOATS)
def test_update_matches_reference(b, d, n, dtype, state, device):
    made = step_problem(b, d, n, dtype, device, state)
    assert_accurate(in_place(update), in_place(reference.selective_scan_update), made)


@pytest.mark.parametrize("n", [5, 16])
def test_steps_equal_prefill(n, device):
    made = problem(2, 20, 70, n, device=device, state=torch.float32)
    y, final_state = scan(**made)
    state = made.pop("initial_state").clone()
    steps = [update(state=state, **(made | {k: made[k][:, t] for k in ACTIVATIONS})) for t in range(20)]
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state, final_state, rtol=2e-6, atol=2e-6)


def test_reads_slices_as_they_lie(device):
    made = problem(device=device)
    assert_equal(scan(**poisoned(made, ACTIVATIONS, 2)), scan(**made))
    transposed = {k: made[k].mT.contiguous().mT for k in (*ACTIVATIONS, "A")}
    assert_equal(scan(**(made | transposed)), scan(**made))
    made = step_problem(device=device)
    assert_equal(in_place(update)(**poisoned(made, ACTIVATIONS, 1)), in_place(update)(**made))


def test_softplus_and_exp_are_accurate(device):
    # With x = B = C = 1 and A = 0 the output of the first step is dt; with x = 0 the next state is exp(dt A).
    dt = torch.cat([torch.linspace(-80, 80, 100_001), torch.logspace(-30, 0, 1001)]).to(device)
    one = torch.ones(1, 1, device=device)
    tokens = one.expand(len(dt), 1)
    y = update(tokens, torch.zeros(len(dt), 1, 1, device=device), dt[:, None], 0 * one, tokens, tokens)
    assert ulps(y.flatten(), F.softplus(dt.double(), threshold=100)) < 3
    dt = torch.linspace(0, 87, len(dt), device=device)
    state = torch.ones(len(dt), 1, 1, device=device)
    update(0 * tokens, state, dt[:, None], -one, tokens, tokens, dt_softplus=False)
    assert ulps(state.flatten(), torch.exp(-dt.double())) < 1.5


def test_every_instruction_set_matches_reference(on_isa):
    problems = [
        problem(*size, dtype, state=dtype) for size in [(1, 7, 9, 5), (2, 20, 66, 16)] for dtype in FLOATS
    ]
    assert_accurate_on_isa(on_isa, scan, reference.selective_scan, problems)


def test_extreme_inputs_stay_finite(device):
    extreme = torch.tensor([-3e38, -1e4, -100, 0, 100, 1e4], device=device)
    for A in (-3e38, -1e3, 0.0, 1e3, 3e38):
        made = problem(1, 6, 6, 2, device=device, state=torch.float32)
        made |= {"A": torch.full((6, 2), A, device=device), "z": extreme.expand(1, 6, 6)}
        made["dt"] = made["z"].mT
        assert all(v.isfinite().all() for v in scan(**made))
        assert all(v.isfinite().all() for v in scan(**made, dt_softplus=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_inputs_in_16_bits_stay_finite(dtype, device):
    largest = torch.finfo(dtype).max
    extreme = torch.tensor([-largest, -1e4, -100, 0, -0.0, 100, 1e4, 30], dtype=dtype, device=device)
    for A in (-3e38, -1e3, 0.0, 1e3, 3e38):
        made = problem(1, 8, 8, 16, dtype, device, torch.float32)
        made |= {"A": torch.full((8, 16), A, device=device), "z": extreme.expand(1, 8, 8)}
        made["dt"] = made["z"].mT
        for softplus in (True, False):
            y, state = scan(**made, dt_softplus=softplus)
            assert state.isfinite().all() and not y.isnan().any()


def test_misaligned_rows(device):
    """Rows that cannot be read 16 bytes at a time."""
    made = problem(1, 70, 16, 16, torch.bfloat16, device)
    expected = reference.selective_scan(**made)
    for name in ACTIVATIONS:
        shifted = torch.cat([made[name].new_zeros(1), made[name].flatten()])[1:].view_as(made[name])
        for got, want in zip(scan(**(made | {name: shifted})), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)


def test_same_bits_for_any_thread_count():
    assert_same_for_any_thread_count(scan, problem(3, 19, 321, 16, state=torch.float32))


@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_gradient_matches_reference(outputs, device):
    made = problem(device=device, state=torch.float32)
    assert_gradients_match(scan, reference.selective_scan, made, outputs)
    made = packed(problem(1, 6, device=device), (2, 0, 4))
    assert_gradients_match(scan, reference.selective_scan, made, outputs)


def test_gradient_in_16_bits_matches_reference(device):
    made = problem(dtype=torch.bfloat16, device=device, state=torch.bfloat16)
    assert_gradients_match(scan, reference.selective_scan, made)


def test_reference_gradient():
    assert_reference_gradients(reference.selective_scan, problem(2, 3, 2, 2, state=torch.float32))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_is_a_good_citizen(needs_grad, device):
    check_citizen(scan, problem(device=device, state=torch.float32), needs_grad)


def test_packed_and_update_are_good_citizens(device):
    check_citizen(scan, packed(problem(1, 6, device=device), (2, 0, 4)))
    check_citizen(update, step_problem(device=device))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"x": p["x"][0]}, "x must have 3 dimensions, not 2"),
        (lambda p: {"x": p["x"].double()}, "x must be Float, BFloat16 or Half, not Double"),
        (lambda p: {"dt": p["dt"].half()}, "dt must be Float, not Half"),
        (lambda p: {"dt": p["dt"][:, :, :1]}, r"dt must be \[2, 6, 5\], not \[2, 6, 1\]"),
        (lambda p: {"A": p["A"][0]}, "A must have 2 dimensions, not 1"),
        (lambda p: {"A": p["A"].half()}, "A must be Float, not Half"),
        (lambda p: {"A": p["A"][:4]}, r"A must be \[5, 3\], not \[4, 3\]"),
        (lambda p: {"B": p["B"][:, :, :2]}, r"B must be \[2, 6, 3\], not \[2, 6, 2\]"),
        (lambda p: {"C": p["C"][:, :5]}, r"C must be \[2, 6, 3\], not \[2, 5, 3\]"),
        (lambda p: {"D": p["D"][:4]}, r"D must be \[5\], not \[4\]"),
        (lambda p: {"D": p["D"].bfloat16()}, "D must be Float, not BFloat16"),
        (lambda p: {"z": p["z"].bfloat16()}, "z must be Float, not BFloat16"),
        (lambda p: {"dt_bias": p["dt_bias"].half()}, "dt_bias must be Float, not Half"),
        (lambda p: {"initial_state": p["A"]}, r"initial_state must be \[2, 5, 3\], not \[5, 3\]"),
        (
            lambda p: {"cu_seqlens": torch.tensor([0, 6]).int()},
            "x must have a batch of 1 beside cu_seqlens, not 2",
        ),
    ],
)
def test_refuses(change, message):
    made = problem()
    with pytest.raises(RuntimeError, match=message):
        scan(**(made | change(made)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"x": p["x"][None]}, "x must have 2 dimensions, not 3"),
        (lambda p: {"state": p["state"][:1]}, r"state must be \[2, 5, 3\], not \[1, 5, 3\]"),
        (lambda p: {"state": p["state"].mT.contiguous().mT}, "state must be contiguous"),
        (lambda p: {"state": p["state"].double()}, "state must be Float, BFloat16 or Half, not Double"),
    ],
)
def test_update_refuses(change, message):
    made = step_problem()
    with pytest.raises(RuntimeError, match=message):
        update(**(made | change(made)))
