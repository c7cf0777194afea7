"""What only the Hopper kernels of the selective scan and the norms can get wrong."""

import pytest
import torch

import ternary_ssm  # noqa: F401
from recurrences import assert_equal, packed
from ternary_ssm import reference
from test_norm import add_problem, gated_problem
from test_selective_scan import problem as scan_problem
from test_selective_scan import step_problem
from test_selective_scan_fused import problem as fused_problem

ops = torch.ops.ternary
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("slowest", [16, 0.01])
def test_long_sequences_stay_accurate(slowest):
    """Fast exponentials must not drift: state and output against float64, errors of the whole in norm."""
    made = scan_problem(1, 2000, 32, 16, BF16, "cuda", torch.float32)
    made |= {"A": -slowest * torch.rand(32, 16, device="cuda")}
    double = {k: v.double() for k, v in made.items()}
    results = ops.selective_scan(**made), reference.selective_scan(**made), reference.selective_scan(**double)
    for got, same, exact in zip(*results, strict=True):
        error, allowed = ((v - exact).norm() / exact.norm() for v in (got, same))
        assert error <= 2 * allowed + 2e-6


@pytest.mark.parametrize("make", [scan_problem, fused_problem])
def test_same_bits_again(make):
    op = ops.selective_scan_fused if make is fused_problem else ops.selective_scan
    made = make(3, 200, 520, 16, dtype=BF16, device="cuda")
    expected = op(**made)
    for _ in range(5):
        assert_equal(op(**made), expected)


def test_sequences_do_not_see_each_other():
    made = scan_problem(1, 300, 24, 16, BF16, "cuda")
    y, state = ops.selective_scan(**packed(made, (100, 70, 130)))
    for i, (begin, end) in enumerate(((0, 100), (100, 170), (170, 300))):
        parts = {k: v[:, begin:end] if v.dim() == 3 else v for k, v in made.items()}
        assert_equal(ops.selective_scan(**parts), (y[:, begin:end], state[i : i + 1]))


def test_bounds_outside_x_read_nothing_there():
    for dtype, n in ((BF16, 16), (torch.float32, 5)):
        made = scan_problem(1, 70, 16, n, dtype, "cuda")
        bounds = torch.tensor([-100, 5, 3, 2**31 - 1], device="cuda", dtype=torch.int32)
        y, state = ops.selective_scan(**made, cu_seqlens=bounds)
        assert y.shape == (1, 70, 16) and state.isfinite().all()


def test_a_chain_waits_for_what_it_reads():
    """The norms and the update start beside the kernel before them, which may still write their inputs."""
    gated = gated_problem((4,), 2048, 1, dtype=BF16, device="cuda")
    add = add_problem((4,), 2048, BF16, device="cuda")
    step = step_problem(4, 2048, 16, BF16, "cuda")
    weight = ops.quantize(0.02 * torch.randn(2048, 2048, device="cuda"), 128, torch.float16)

    def chain(wait):
        x, residual, state = add["x"], add["residual"].clone(), step["state"].clone()
        for _ in range(12):
            wait()
            x = ops.add_rms_norm(x, residual, add["weight"], 1e-5)
            wait()
            x = ops.gemm(x, *weight)
            wait()
            x = ops.selective_scan_update(**(step | {"x": x, "z": x, "state": state}))
            wait()
            x = ops.rms_norm_gated(**(gated | {"y": x}))
        return x, residual, state

    expected = chain(torch.cuda.synchronize)
    for _ in range(20):
        assert_equal(chain(lambda: None), expected)


def test_graph_replays():
    fused = fused_problem(1, 100, 48, 16, 32, 32, BF16, "cuda")
    step = step_problem(2, 48, 16, BF16, "cuda")
    add = add_problem((5,), 64, BF16, device="cuda")

    def run():
        y = ops.selective_scan_update(**step)
        return *ops.selective_scan_fused(**fused), y, ops.add_rms_norm(**add), step["state"], add["residual"]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for inputs in (fused, step, add):
            inputs["x"].normal_()
        before = step["state"].clone(), add["residual"].clone()
        graph.replay()
        results = [v.clone() for v in captured]
        step["state"].copy_(before[0])
        add["residual"].copy_(before[1])
        assert_equal(results, run())
