"""What only the Hopper kernels can get wrong: their sizes, alignments, streams and graphs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ternary_ssm  # noqa: F401
from ternary_ssm import _C, reference

ops = torch.ops.ternary
needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# in_proj and out_proj of the published Mamba-2 models, [n, k]
WIDTHS = {"130m": 768, "370m": 1024, "780m": 1536, "1.3b": 2048, "2.7b": 2560}
PROJECTIONS = [
    shape for d in WIDTHS.values() for shape in ((2 * 2 * d + 2 * 128 + 2 * d // 64, d), (d, 2 * d))
]
ROWS = [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513]
H200 = 132  # multiprocessors


def weight(n: int, k: int, group: int, scale_dtype: torch.dtype = F16) -> tuple[Tensor, Tensor]:
    """Codes, invalid ones too, and scales (group 0: one for all), in the midst of what must not be read."""
    codes = torch.full((n + 2, k // 4), 0x55, dtype=torch.uint8, device="cuda")
    codes[1:-1] = torch.randint(0, 256, (n, k // 4), device="cuda")
    rows, groups = (n, k // group) if group else (1, 1)
    scales = torch.full((rows + 2, groups), torch.nan, dtype=scale_dtype, device="cuda")
    scales[1:-1] = 0.5 + torch.rand(rows, groups, device="cuda")
    return codes[1:-1], scales[1:-1]


def rows_of_x(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """[m, k] before rows of NaN."""
    x = torch.full((m + 1, k), torch.nan, dtype=dtype, device="cuda")
    x[:m] = torch.randn(m, k, device="cuda")
    return x[:m]


def assert_as_good_as_torch(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None):
    """At most twice as far from float64 as torch's product in x's dtype; the same bits again."""
    y = ops.gemm(x, codes, scales, bias)
    assert torch.equal(y, ops.gemm(x, codes, scales, bias))
    dense = reference.dequantize(codes, scales, torch.float64)
    exact = F.linear(x.double(), dense, None if bias is None else bias.double())
    torch_y = F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    epsilon = torch.finfo(x.dtype).eps * exact.abs().max()
    assert (y.double() - exact).abs().max() <= 2 * (torch_y.double() - exact).abs().max() + epsilon


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


@gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("n, k", PROJECTIONS)
def test_gemm_of_the_published_models(n, k, dtype):
    codes, scales = weight(n, k, 128)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    for m in ROWS:
        assert_as_good_as_torch(rows_of_x(m, k, dtype), codes, scales, bias if m % 2 else None)


@gpu
@pytest.mark.parametrize("scale_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 192, 256, 384, 768, 0])
def test_gemm_of_every_group(group, scale_dtype):
    codes, scales = weight(395, 768, group, scale_dtype)
    for m, dtype in ((1, BF16), (8, F16), (9, BF16), (16, F16), (17, BF16), (64, F16), (200, BF16), (3, F32)):
        assert_as_good_as_torch(rows_of_x(m, 768, dtype), codes, scales)


@gpu
@pytest.mark.parametrize("k", [4, 60, 64, 160, 192, 320, 5056, 5120, 5124, 5184, 8192])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 129, 2113])
def test_gemm_of_ragged_sizes(n, k):
    codes, scales = weight(n, k, k)
    for m, dtype in ((1, F16), (8, BF16), (16, BF16), (17, F16), (64, BF16), (129, F16), (2, F32)):
        assert_as_good_as_torch(rows_of_x(m, k, dtype), codes, scales)
    assert_as_good_as_torch(rows_of_x(3, k, BF16), *weight(n, k, 0))


@gpu
def test_gemm_of_a_long_vocabulary():
    codes, scales = weight(50288, 768, 128)
    for m in (1, 12, 100):
        assert_as_good_as_torch(rows_of_x(m, 768, BF16), codes, scales)
    for m, k in ((8, 5120), (16, 4096)):  # as many tiles a block as shared memory holds
        assert_as_good_as_torch(rows_of_x(m, k, BF16), *weight(20000, k, 32))


@gpu
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_gemm_of_misaligned_views(dtype):
    codes, scales = weight(100, 512, 128)
    x = rows_of_x(5, 512, dtype)
    expected = reference.gemm(x, codes, scales)

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)

    for args in (
        (shifted(x), codes, scales),
        (x, shifted(codes), scales),
        (x, codes, shifted(scales)),
        (x, codes, scales, shifted(torch.zeros(100, device="cuda", dtype=dtype))),
    ):
        torch.testing.assert_close(ops.gemm(*args), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@gpu
def test_gemm_keeps_rows_apart():
    codes, scales = weight(65, 256, 128)
    for m in (2, 8, 16, 33, 70, 200):
        x = rows_of_x(m, 256, BF16)
        expected = ops.gemm(x, codes, scales)
        x[1] = torch.inf
        y = ops.gemm(x, codes, scales)
        assert not y[1].isfinite().any()
        y[1] = expected[1]
        assert torch.equal(y, expected)


@gpu
def test_gemm_is_no_matter_of_the_other_rows():
    codes, scales = weight(3352, 768, 128)
    x = rows_of_x(16, 768, F16)
    for m in (1, 5, 8, 9):
        assert torch.equal(ops.gemm(x[:m], codes, scales), ops.gemm(x, codes, scales)[:m])


def assert_fp8_matches_reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None):
    """The reference rounds x to the same numbers; what is left is the tensor cores' short sums of a span."""
    y = ops.gemm(x, codes, scales, bias, "fp8")
    assert torch.equal(y, ops.gemm(x, codes, scales, bias, "fp8"))
    expected = reference.gemm(x.float(), codes, scales.float(), bias, "fp8")
    error = (y.float() - expected).norm() / expected.norm()
    assert error <= (5e-4 if x.dtype == F32 else 2e-3 if x.dtype == F16 else 5e-3)


@gpu
@pytest.mark.parametrize("group", [32, 64, 96, 128, 192, 384, 768, 0])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_fp8_gemm_of_every_group(group, dtype):
    codes, scales = weight(395, 768, group)
    bias = torch.randn(395, device="cuda", dtype=dtype)
    for m in (1, 12, 20, 64, 127, 129, 300):
        assert_fp8_matches_reference(rows_of_x(m, 768, dtype), codes, scales, bias if m % 2 else None)


@gpu
@pytest.mark.parametrize("n, k", [(1, 64), (129, 192), (130, 100), (8512, 2048), (2048, 4096), (2113, 5184)])
def test_fp8_gemm_of_many_sizes(n, k):
    codes, scales = weight(n, k, k)
    for m in (1, 40, 128, 520):
        assert_fp8_matches_reference(rows_of_x(m, k, BF16), codes, scales)


@gpu
def test_fp8_gemm_of_rows_of_any_size():
    codes, scales = weight(256, 512, 128)
    x = rows_of_x(200, 512, BF16)
    expected = ops.gemm(x, codes, scales, activations="fp8")
    powers = torch.randint(-20, 20, (200, 1), device="cuda").float().exp2()
    y = ops.gemm((x * powers).to(BF16), codes, scales, activations="fp8")
    assert torch.equal(y, (expected * powers).to(BF16))  # the scale of a row is its own
    x[3], x[7], x[9, 100] = 0, torch.inf, torch.nan
    y = ops.gemm(x, codes, scales, activations="fp8")
    assert not y[3].any() and y[7].isnan().all() and y[9].isnan().all()
    others = [i for i in range(200) if i not in (3, 7, 9)]
    assert torch.equal(y[others], expected[others])


@gpu
def test_fp8_costs_a_few_percent(record_property):
    codes, scales = weight(2048, 4096, 128)
    x = rows_of_x(512, 4096, BF16)
    exact = F.linear(x.double(), reference.dequantize(codes, scales, torch.float64))
    errors = [
        ((ops.gemm(x, codes, scales, None, mode).double() - exact).norm() / exact.norm()).item()
        for mode in ("a16", "fp8")
    ]
    record_property("relative error of a16, fp8", errors)
    print("relative error of a16, fp8", errors)
    assert errors[0] < 4e-3 and errors[0] < errors[1] < 4e-2


@gpu
def test_a_chain_waits_for_what_it_reads():
    """Launches overlap: none may read the codes or the x that a kernel before it is still writing."""
    dense = 0.03 * torch.randn(8, 2048, 2048, device="cuda")
    weights = [ops.quantize(w, 128, F16) for w in dense]
    x = torch.randn(4, 2048, device="cuda", dtype=BF16)
    expected = x
    for w in weights:
        torch.cuda.synchronize()
        expected = ops.gemm(expected, *w)
    for _ in range(20):
        y = z = x
        for w in dense:
            y = ops.gemm(y, *ops.quantize(w, 128, F16))
        for w in weights:
            z = ops.gemm(z, *w)
        assert torch.equal(y, expected) and torch.equal(z, expected)


@gpu
@pytest.mark.parametrize("m", [3, 64, 130])
def test_graph_replays(m):
    codes, scales = weight(2048, 2048, 128)
    x = torch.randn(m, 2048, device="cuda", dtype=BF16) * 0.01
    dense = torch.randn(64, 128, device="cuda")

    def run():
        y = x
        for _ in range(4):
            y = ops.gemm(y, codes, scales) * 0.01
        return y, *ops.quantize(dense, 32, F16), *ops.quantize(dense, 0, F16)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        x.normal_()
        dense.normal_()
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


@gpu
def test_two_streams_share_no_workspace():
    """Blocks that share a tile leave their parts for each other: launches side by side must not mix them."""
    codes, scales = weight(8512, 2048, 128)
    xs = [rows_of_x(m, 2048, BF16) for m in (64, 100, 64, 300)]
    expected = [ops.gemm(x, codes, scales) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for x, stream in zip(xs * 5, streams * 5, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.gemm(x, codes, scales))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected * 5, strict=True))


@gpu
def test_runs_in_the_callers_stream():
    codes, scales = weight(8512, 2048, 128)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.zeros(2, 2048, device="cuda", dtype=F16)
        torch.cuda._sleep(10_000_000)
        x += 1
        y = ops.gemm(x, codes, scales)
    stream.synchronize()
    assert torch.equal(y, ops.gemm(torch.ones_like(x), codes, scales))


@gpu
@pytest.mark.parametrize("group", [0, 32, 64])
def test_quantize_shows_what_is_not_finite(group):
    """Raising would make the host wait: the scale of the group is not finite and its codes are 0."""
    for value in (torch.nan, torch.inf, -torch.inf):
        dense = torch.ones(5, 64, device="cuda")
        dense[2, 37] = value
        codes, scales = ops.quantize(dense, group, F16)
        expected = reference.quantize(dense, group, F16)
        assert torch.equal(codes, expected[0]) and torch.equal(scales.isfinite(), expected[1].isfinite())
        seen = ops.dequantize(codes, scales, F32)[2, 37]
        assert not seen.isfinite()


@gpu
def test_quantize_takes_misaligned_weights():
    for dtype in (F32, BF16, F16):
        dense = torch.randn(12 * 256 + 1, device="cuda").to(dtype)[1:].view(12, 256)
        for group in (0, 32, 64, 128, 256):
            for a, b in zip(
                ops.quantize(dense, group, F16), reference.quantize(dense.clone(), group, F16), strict=True
            ):
                assert torch.equal(a, b)


@gpu
def test_pack_takes_signs():
    values = torch.randint(-128, 128, (33, 516), dtype=torch.int8, device="cuda")
    for t in (values, values.flatten()[1:-3].view(-1, 4)):
        assert torch.equal(ops.unpack(ops.pack(t)), t.sign())


def test_gemm_plan_of_the_published_models():
    for n, k in PROJECTIONS:
        for group in (32, 64, 128, 256, k):
            for m in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 512, 4096):
                plan = _C.gemm_plan(m, n, k, group, False, True, H200)
                assert plan["kernel"] != "plain" and group % plan["span"] == 0
                check_plan(plan, m, n, k)
            plan = _C.gemm_plan(4096, n, k, group, False, True, H200, fp8=True)
            if group == 32:
                assert plan["kernel"] == "plain"
            else:
                check_plan(plan, 4096, n, k)
                assert plan["span"] == min(group, 128) and plan["workspace"] >= 4096 * (k + 4)


def test_gemm_plan_of_few_rows_in_fp8():
    for n, k in PROJECTIONS:
        for m in (1, 8, 16, 17, 64):
            plan = _C.gemm_plan(m, n, k, 128, False, True, H200)
            fp8 = _C.gemm_plan(m, n, k, 128, False, True, H200, fp8=True)
            if plan["kernel"] in ("stream", "split"):  # which then take the rounded x in its own type
                assert fp8 | {"workspace": 0} == plan and fp8["workspace"] == m * (2 * k + 4)
            else:
                assert fp8["kernel"] == "tile"
    assert _C.gemm_plan(65, 64, 128, 32, False, True, H200, fp8=True)["kernel"] == "plain"
    assert _C.gemm_plan(64, 64, 128, 32, False, True, H200, fp8=True)["kernel"] == "split"


def check_plan(plan: dict, m: int, n: int, k: int) -> None:
    """Every row, column and row of x belongs to a block, and the kernel has what the plan asks for."""
    blocks, cluster = plan["blocks"], plan["cluster"]
    assert blocks % cluster == 0 and 1 <= cluster <= 8
    if plan["kernel"] == "stream":
        assert m <= plan["rows_of_x"] and plan["workspace"] == 0
        assert plan["chunk"] * plan["warps"] >= k > plan["chunk"] * (plan["warps"] - 1)
        assert 16 * blocks * plan["tiles"] >= n > 16 * blocks * (plan["tiles"] - 1)
        assert plan["rows_of_x"] * plan["chunk"] * plan["warps"] <= 16 * 256 * 16  # registers
    elif plan["kernel"] == "split":
        columns, rows = 512 * plan["boxes"], 64 * plan["units"]
        assert m <= plan["rows_of_x"] <= 64 and plan["workspace"] == 0
        assert cluster * columns >= k > (cluster - 1) * columns
        assert blocks // cluster * rows >= n > (blocks // cluster - 1) * rows
        assert plan["rows_of_x"] * columns * 2 + plan["units"] * columns * 16 <= 226 * 1024
    else:
        assert plan["rows_of_x"] in (64, 128, 256)
        assert plan["tiles"] == -(-n // 128) * -(-m // plan["rows_of_x"])
        assert plan["steps"] in (-(-k // 128), -(-k // 256))  # of 16 bits, of e4m3
        assert 1 <= blocks <= min(H200, plan["tiles"] * plan["steps"])


@pytest.mark.parametrize(
    "sizes", [(1, 8, 100, 100), (17, 8, 100, 100), (1, 8, 128, 16), (1, 2**27, 256, 128)]
)
def test_gemm_plan_of_the_rest(sizes):
    assert _C.gemm_plan(*sizes, False, True, H200)["kernel"] == "plain"
    assert _C.gemm_plan(1, 64, 128, 128, False, False, H200)["kernel"] == "plain"  # misaligned, or fp32


def test_gemm_plan_of_long_rows():
    assert _C.gemm_plan(8, 64, 5120, 128, False, True, H200)["kernel"] == "stream"
    assert _C.gemm_plan(8, 64, 5184, 64, False, True, H200)["kernel"] == "split"
    assert _C.gemm_plan(8, 64, 8256, 64, False, True, H200)["kernel"] == "tile"


def test_gemm_plan_covers_every_row():
    for n in range(1, 5000, 7):
        plan = _C.gemm_plan(1, n, 768, 128, False, True, H200)
        tiles = -(-n // 16)
        assert 1 <= plan["blocks"] <= tiles
        assert plan["tiles"] <= 8 and plan["tiles"] == -(-tiles // plan["blocks"])
