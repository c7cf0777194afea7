import pytest
import torch

import ternary_ssm  # noqa: F401
from recurrences import (
    FLOATS,
    assert_accurate,
    assert_accurate_on_isa,
    assert_close_in_norm,
    assert_equal,
    assert_gradients_match,
    assert_reference_gradients,
    assert_same_for_any_thread_count,
    check_citizen,
    in_double,
    in_place,
    packed,
    poisoned,
)
from ternary_ssm import reference

ssd = torch.ops.ternary.ssd
update = torch.ops.ternary.ssd_update
ACTIVATIONS = ("x", "dt", "B", "C", "z")


def problem(b=2, l=6, h=4, p=5, g=2, n=3, dtype=torch.float32, device="cpu", state=None, sequences=None):
    made = {
        "x": torch.randn(b, l, h, p).to(dtype),
        "dt": torch.randn(b, l, h).to(dtype),
        "A": -16 * torch.rand(h),
        "B": torch.randn(b, l, g, n).to(dtype),
        "C": torch.randn(b, l, g, n).to(dtype),
        "D": torch.randn(h),
        "z": torch.randn(b, l, h, p).to(dtype),
        "dt_bias": torch.randn(h) - 2,
    }
    if state:
        made["initial_state"] = torch.randn(sequences or b, h, p, n).to(state)
    return {k: v.to(device) for k, v in made.items()}


def step_problem(b=2, h=4, p=5, g=2, n=3, dtype=torch.float32, device="cpu", state=torch.float32):
    made = problem(b, 1, h, p, g, n, dtype, device, state)
    state = made.pop("initial_state")
    return made | {k: made[k][:, 0] for k in ACTIVATIONS} | {"state": state}


def rounding_dt_x(**problem):
    """The reference with dt x rounded to x's dtype, as torch's products in 16 bits would take it."""
    given, problem = problem, in_double(problem)
    x, dtype = problem["x"], given["x"].dtype
    dt = reference.recurrences._step_size(
        problem["dt"],
        problem.get("dt_bias"),
        problem.get("dt_softplus", True),
        problem.get("dt_min", 0.0),
        problem.get("dt_max"),
    ).unsqueeze(-1)
    rounded = torch.where(dt == 0, 0, (x * dt).to(dtype).double() / dt)
    y, state = reference.ssd(**(problem | {"x": rounded, "D": None, "z": None}))
    D = problem.get("D")
    D = D.unsqueeze(-1) if D is not None and D.dim() == 1 else D
    y = reference.recurrences._skip_and_gate(y, x, D, problem.get("z"))
    state_dtype = torch.promote_types(dtype, torch.float32)
    if given.get("initial_state") is not None:
        state_dtype = given["initial_state"].dtype
    return y.to(dtype), state.to(state_dtype)


def assert_ssd_accurate(made):
    """GPUs multiply 16-bit activations on the tensor cores, which takes one factor in 16 bits."""
    x, B = made["x"], made["B"]
    if x.is_cuda and x.itemsize == 2 and x.shape[3] % 8 == 0 and B.shape[3] % 8 == 0:
        assert_close_in_norm(ssd, rounding_dt_x, reference.ssd, made)
    else:
        assert_accurate(ssd, reference.ssd, made)


# Lengths around the kernel's tile of 16 tokens and the reference's chunk of 64, rows around its four, any n.
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 6, 4, 5, 2, 3),
    (1, 17, 2, 64, 1, 128),
    (1, 65, 2, 7, 2, 16),
    (2, 16, 3, 8, 1, 17),
    (3, 33, 6, 4, 3, 64),
]
EMPTY = [(0, 5, 4, 4, 1, 8), (2, 0, 4, 4, 1, 8), (2, 5, 0, 4, 1, 8), (2, 5, 2, 0, 1, 8), (2, 5, 2, 4, 1, 0)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("b, l, h, p, g, n", SIZES + EMPTY)
def test_matches_reference(b, l, h, p, g, n, dtype, device):
    for state in (None, dtype):
        made = problem(b, l, h, p, g, n, dtype, device, state)
        assert_ssd_accurate(made)


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("options", [{}, {"dt_softplus": False}, {"dt_min": 0.05, "dt_max": 0.2}])
def test_matches_reference_with_options(without, options, device):
    made = problem(dtype=torch.bfloat16, device=device, state=torch.float32) | dict.fromkeys(without)
    assert_accurate(ssd, reference.ssd, made | options)


def test_matches_reference_with_skip_per_channel(device):
    made = problem(device=device) | {"D": torch.randn(4, 5, device=device)}
    assert_accurate(ssd, reference.ssd, made)


@pytest.mark.parametrize("dtype, p", [(torch.float32, 4), (torch.bfloat16, 64), (torch.float16, 64)])
def test_fast_and_slow_decay_side_by_side(dtype, p, device):
    made = problem(1, 130, 2, p, 1, 8, dtype, device, torch.float32) | {"dt_bias": None}
    made["dt"][:, ::7] = 40.0  # times A: a decay to nothing between tokens that hardly decay
    made["dt"][:, 1::7] = -12.0
    assert_ssd_accurate(made)


# Around the GPU's chunks of 64 tokens, its units of 64 rows, two a block, and its panels of 64 columns.
CHUNKED = [
    (1, 1, 1, 8, 1, 8),
    (2, 63, 3, 64, 1, 128),
    (1, 64, 4, 64, 2, 64),
    (1, 65, 3, 80, 3, 136),
    (2, 129, 6, 48, 2, 256),
    (1, 1000, 2, 64, 1, 128),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b, l, h, p, g, n", CHUNKED)
def test_matches_reference_in_chunks(b, l, h, p, g, n, dtype, device):
    for state in (None, torch.float32, dtype):
        made = problem(b, l, h, p, g, n, dtype, device, state)
        assert_ssd_accurate(made)


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize(
    "options", [{}, {"dt_softplus": False}, {"dt_min": 0.05, "dt_max": 0.2}, {"D": "per channel"}]
)
def test_chunks_with_options(without, options, device):
    made = problem(1, 100, 4, 64, 2, 128, torch.bfloat16, device, torch.float32) | dict.fromkeys(without)
    if "D" in options:
        options = {"D": torch.randn(4, 64, device=device)}
    made |= options
    assert_ssd_accurate(made)


@pytest.mark.parametrize("lengths", [(300,), (0, 3, 0, 1, 64, 65, 0, 190, 63, 0), (0,), (1,) * 70])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
def test_chunks_of_packed_sequences(lengths, state, device):
    made = problem(1, sum(lengths), 2, 64, 1, 64, torch.bfloat16, device, state, len(lengths))
    made = packed(made, lengths)
    assert_ssd_accurate(made)


def test_chunks_keep_sequences_apart(device):
    made = packed(problem(1, 90, 2, 64, 1, 64, torch.bfloat16, device), (40, 50))
    y, state = ssd(**made)
    for name in ACTIVATIONS:
        made[name][:, 40:] = torch.nan
    other, other_state = ssd(**made)
    assert_equal((other[:, :40], other_state[:1]), (y[:, :40], state[:1]))
    assert other[:, 40:].isnan().all() and other_state[1:].isnan().all()


def test_chunks_are_read_as_they_lie(device):
    made = problem(2, 70, 8, 64, 2, 64, torch.bfloat16, device)
    order = ("z", "x", "B", "C", "dt")  # all rows whole vectors
    sizes = [made[name].flatten(2).shape[2] for name in order]
    pieces = torch.cat([made[name].flatten(2) for name in order], -1).split(sizes, -1)
    slices = {k: v.unflatten(2, made[k].shape[2:]) for k, v in zip(order, pieces, strict=True)}
    assert_equal(ssd(**(made | slices)), ssd(**made))
    assert_ssd_accurate(poisoned(made, ACTIVATIONS, 2))


@pytest.mark.parametrize("lengths", [(7,), (0, 3, 0, 1, 70, 0), (0,)])
@pytest.mark.parametrize("state", [None, torch.float32, torch.float16])
def test_matches_reference_on_packed_sequences(lengths, state, device):
    made = problem(1, sum(lengths), 2, 9, 1, 16, device=device, state=state, sequences=len(lengths))
    assert_accurate(ssd, reference.ssd, packed(made, lengths))


@pytest.mark.parametrize(
    "b, h, p, g, n",
    [
        (1, 1, 1, 1, 1),
        (2, 4, 5, 2, 3),
        (3, 2, 64, 1, 128),
        (2, 3, 33, 1, 64),
        (1, 2, 80, 2, 24),
        (1, 2, 7, 1, 256),
        (1, 1, 3, 1, 264),
        (2, 1, 4, 1, 520),
        (0, 4, 4, 1, 8),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("state", FLOATS)
def test_update_matches_reference(b, h, p, g, n, dtype, state, device):
    made = step_problem(b, h, p, g, n, dtype, device, state)
    assert_accurate(in_place(update), in_place(reference.ssd_update), made)


@pytest.mark.parametrize("n", [5, 16])
def test_steps_equal_prefill(n, device):
    made = problem(2, 40, 4, 7, 2, n, device=device, state=torch.float32)
    y, final_state = ssd(**made)
    state = made.pop("initial_state").clone()
    steps = [update(state=state, **(made | {k: made[k][:, t] for k in ACTIVATIONS})) for t in range(40)]
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state, final_state, rtol=2e-6, atol=2e-6)


def test_reads_slices_as_they_lie(device):
    made = problem(device=device)
    assert_equal(ssd(**poisoned(made, ACTIVATIONS, 2)), ssd(**made))
    transposed = {k: made[k].transpose(1, 2).contiguous().transpose(1, 2) for k in ACTIVATIONS}
    assert_equal(ssd(**(made | transposed)), ssd(**made))
    made = step_problem(device=device)
    assert_equal(in_place(update)(**poisoned(made, ACTIVATIONS, 1)), in_place(update)(**made))


def test_every_instruction_set_matches_reference(on_isa):
    problems = [
        problem(*size, dtype, state=dtype)
        for size in [(1, 7, 4, 5, 2, 3), (2, 35, 2, 9, 1, 48)]
        for dtype in FLOATS
    ]
    assert_accurate_on_isa(on_isa, ssd, reference.ssd, problems)


def test_extreme_inputs_stay_finite(device):
    extreme = torch.tensor([-3e38, -1e4, -100, 0, 100, 1e4], device=device)
    for A in (-3e38, -1e3, 0.0, 1e3, 3e38):
        made = problem(1, 6, 6, 2, 1, 2, device=device, state=torch.float32)
        made |= {"A": torch.full((6,), A, device=device), "dt": extreme.expand(1, 6, 6).mT}
        made["z"] = extreme.expand(1, 2, 6, 6).permute(0, 2, 3, 1)
        for op in (ssd, reference.ssd):
            assert all(v.isfinite().all() for v in op(**made))
            assert all(v.isfinite().all() for v in op(**made, dt_softplus=False))


def test_extreme_steps_in_chunks_stay_finite(device):
    extreme = torch.tensor([-3e38, -1e4, -100, 0, 100, 1e4], device=device)
    for A in (-3e38, -1e3, 0.0, 1e3, 3e38):
        made = problem(1, 70, 6, 8, 1, 8, torch.bfloat16, device, torch.float32)
        made |= {"A": torch.full((6,), A, device=device)}
        made["dt"][:] = extreme.bfloat16()
        for options in ({}, {"dt_softplus": False}):
            assert all(v.isfinite().all() for v in ssd(**made, **options))


def test_is_deterministic(device):
    made = problem(2, 200, 4, 64, 2, 128, torch.bfloat16, device)
    assert_equal(ssd(**made), ssd(**made))


def test_same_bits_for_any_thread_count():
    assert_same_for_any_thread_count(ssd, problem(3, 19, 6, 33, 2, 40, state=torch.float32))


@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
def test_gradient_matches_reference(outputs, device):
    made = problem(device=device, state=torch.float32) | {"dt_max": 0.2}
    assert_gradients_match(ssd, reference.ssd, made, outputs)
    made = packed(problem(1, 6, device=device), (2, 0, 4))
    assert_gradients_match(ssd, reference.ssd, made, outputs)


def test_gradient_in_16_bits_matches_reference(device):
    made = problem(dtype=torch.bfloat16, device=device, state=torch.bfloat16)
    assert_gradients_match(ssd, reference.ssd, made)


def test_reference_gradient():
    assert_reference_gradients(reference.ssd, problem(1, 3, 2, 2, 1, 2, state=torch.float32))


def test_reference_gradient_over_chunks(monkeypatch):
    made = problem(1, 5, 2, 1, 1, 2)
    whole = reference.ssd(**in_double(made))
    monkeypatch.setattr(reference.recurrences, "CHUNK", 2)
    torch.testing.assert_close(reference.ssd(**in_double(made)), whole)
    assert_reference_gradients(reference.ssd, made)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_is_a_good_citizen(needs_grad, device):
    check_citizen(ssd, problem(device=device, state=torch.float32), needs_grad)


def test_packed_and_update_are_good_citizens(device):
    check_citizen(ssd, packed(problem(1, 6, device=device), (2, 0, 4)))
    check_citizen(update, step_problem(device=device))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"x": p["x"][0]}, "x must have 4 dimensions, not 3"),
        (lambda p: {"x": p["x"].double()}, "x must be Float, BFloat16 or Half, not Double"),
        (lambda p: {"dt": p["dt"].half()}, "dt must be Float, not Half"),
        (lambda p: {"dt": p["dt"][:, :, :1]}, r"dt must be \[2, 6, 4\], not \[2, 6, 1\]"),
        (lambda p: {"A": p["A"].half()}, "A must be Float, not Half"),
        (lambda p: {"A": p["A"][:3]}, r"A must be \[4\], not \[3\]"),
        (lambda p: {"B": p["B"][0]}, "B must have 4 dimensions, not 3"),
        (lambda p: {"B": p["B"][:, :, :0]}, "x has 4 heads, not a multiple of B's 0 groups"),
        (lambda p: {"B": torch.randn(2, 6, 3, 3)}, "x has 4 heads, not a multiple of B's 3 groups"),
        (lambda p: {"C": p["C"][:, :, :1]}, r"C must be \[2, 6, 2, 3\], not \[2, 6, 1, 3\]"),
        (lambda p: {"D": p["D"][:3]}, r"D must be \[4\], not \[3\]"),
        (lambda p: {"D": torch.randn(4, 4)}, r"D must be \[4, 5\], not \[4, 4\]"),
        (lambda p: {"D": p["D"].bfloat16()}, "D must be Float, not BFloat16"),
        (lambda p: {"z": p["z"].bfloat16()}, "z must be Float, not BFloat16"),
        (lambda p: {"dt_bias": p["dt_bias"].half()}, "dt_bias must be Float, not Half"),
        (lambda p: {"initial_state": p["x"]}, r"initial_state must be \[2, 4, 5, 3\], not \[2, 6, 4, 5\]"),
        (
            lambda p: {"cu_seqlens": torch.tensor([0, 6]).int()},
            "x must have a batch of 1 beside cu_seqlens, not 2",
        ),
    ],
)
def test_refuses(change, message):
    made = problem()
    with pytest.raises(RuntimeError, match=message):
        ssd(**(made | change(made)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: {"x": p["x"][None]}, "x must have 3 dimensions, not 4"),
        (lambda p: {"state": p["state"][:1]}, r"state must be \[2, 4, 5, 3\], not \[1, 4, 5, 3\]"),
        (lambda p: {"state": p["state"].mT.contiguous().mT}, "state must be contiguous"),
        (lambda p: {"state": p["state"].double()}, "state must be Float, BFloat16 or Half, not Double"),
    ],
)
def test_update_refuses(change, message):
    made = step_problem()
    with pytest.raises(RuntimeError, match=message):
        update(**(made | change(made)))
