"""decode, the operator of a token through all layers."""

import pytest
import torch
from torch import Tensor

from ternary_ssm import _C, MambaConfig, MambaLM, TernaryConfig, pack_, reference
from ternary_ssm.decoder import Decoder, decode_workspace

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
STATES, WORKSPACE = (8, 12), 16  # the arguments conv_state and ssm_state, and workspace


def on_gpu(test):
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


def build(
    ternary: TernaryConfig | None = None, dtype=F32, device="cpu", d_model=256, n_layer=3, **ssm_cfg
) -> MambaLM:
    torch.manual_seed(0)
    config = MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=90, ssm_cfg={"headdim": 32} | ssm_cfg)
    model = MambaLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".D")):
                parameter.uniform_(0.5, 1.5)
    return pack_(model, ternary or TernaryConfig()).to(dtype).to(device).eval()


def arguments(model: MambaLM, batch: int, state_dtype=F32) -> list:
    """Those of the operator, with states of a sequence under way."""
    seen = []
    cache = model.empty_cache(batch, state_dtype)
    cache.conv.normal_()
    cache.ssm.normal_()
    tokens = torch.randint(90, (batch,), device=model.device)
    original, torch.ops.ternary.decode = torch.ops.ternary.decode, lambda *args: seen.extend(args)
    try:
        Decoder(model)(tokens, cache)
    finally:
        torch.ops.ternary.decode = original
    return seen


def copied(args: list, dtype: torch.dtype | None = None) -> list:
    """Copies; of the floats in another dtype if asked for. Scales and tables keep theirs: they are data."""

    def convert(value):
        if isinstance(value, list):  # slices of one stack, as a GPU wants them
            return [*convert(torch.stack(value))]
        if not isinstance(value, Tensor):
            return value
        return value.clone() if dtype is None or not value.is_floating_point() else value.to(dtype, copy=True)

    return [convert(value) for value in args]


def largest(t: Tensor) -> Tensor:
    return t.abs().max()


def check_against_the_reference(args: list, name="decode", states=STATES, size=largest) -> None:
    """The errors of our operator are at most twice those of the reference in the same types."""
    ours, same, exact = copied(args), copied(args), copied(args, torch.float64)
    function = getattr(reference, name)
    y, y_same, y_exact = getattr(torch.ops.ternary, name)(*ours), function(*same), function(*exact)
    assert y.dtype == F32 and y.shape == y_same.shape
    pairs = [(y, y_same, y_exact)] + [(ours[i], same[i], exact[i]) for i in states]
    for got, torch_got, want in pairs:
        eps = torch.finfo(got.dtype).eps
        if y.device.type == "cpu":  # its products take 16 bits of fp32 activations
            eps = max(eps, 2**-14)
        epsilon = 4 * eps * want.abs().max()
        assert size(got - want) <= 2 * size(torch_got - want) + epsilon


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    "ternary",
    [
        TernaryConfig(),
        TernaryConfig(group_size="row", embedding="int8"),
        TernaryConfig(group_size="tensor", scale_dtype="bfloat16"),
        TernaryConfig(embedding="ternary"),
    ],
    ids=["128", "row", "tensor", "table"],
)
def test_as_good_as_the_reference_in_the_same_dtype(device, dtype, ternary, batch):
    if device == "cuda" and dtype == F32:
        pytest.skip("16 bits alone")
    check_against_the_reference(arguments(build(ternary, dtype, device), batch))


LARGE = {"d_model": 2560, "headdim": 64}  # the widths of 2.7B


@on_gpu
@pytest.mark.parametrize(
    ("batch", "dtype", "state_dtype", "ternary", "options"),
    [
        (3, BF16, F32, {}, {}),
        (8, F16, F16, {"group_size": "row", "embedding": "int8"}, {}),
        (9, BF16, BF16, {"group_size": 64}, {"conv_bias": False}),
        (16, F16, F32, {"group_size": 32, "scale_dtype": "float32"}, {}),
        (17, BF16, F16, {"embedding": "int8"}, {}),
        (64, BF16, F32, {"group_size": "tensor", "scale_dtype": "bfloat16"}, {}),
        (65, F16, BF16, {}, {}),
        (130, BF16, F32, {}, {"dt_limit": (0.01, 0.05)}),
        (1, BF16, F32, {}, {"d_state": 64}),  # what the persistent kernel does not take
        (2, F16, BF16, {"group_size": "row"}, {"d_model": 192, "headdim": 4}),
        (5, BF16, F32, {"group_size": "row"}, {"d_model": 200, "headdim": 40, "d_state": 20}),
        (8, BF16, F32, {}, LARGE),
        (9, F16, BF16, {}, LARGE),
    ],
)
def test_the_sequence_of_launches(batch, dtype, state_dtype, ternary, options):
    check_against_the_reference(
        arguments(build(TernaryConfig(**ternary), dtype, "cuda", **options), batch, state_dtype)
    )


@on_gpu
@pytest.mark.parametrize(
    ("batch", "dtype", "layers"), [(2, BF16, 3), (9, BF16, 1), (9, F16, 3), (64, BF16, 3)]
)
def test_a_replayed_graph_has_the_same_bits(batch, dtype, layers):
    """Steps that follow each other closely: a kernel that reads too early would read another step's."""
    args, steps = arguments(build(dtype=dtype, device="cuda", d_model=512, n_layer=layers), batch), 4
    ours, theirs = copied(args), copied(args)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        torch.ops.ternary.decode(*copied(args))
        graph.capture_begin()
        for _ in range(steps):
            y = torch.ops.ternary.decode(*ours)
        graph.capture_end()
    for _ in range(3):
        graph.replay()
        for _ in range(steps):
            expected = torch.ops.ternary.decode(*theirs)
            torch.cuda.synchronize()
        assert torch.equal(y, expected)
        assert all(torch.equal(ours[i], theirs[i]) for i in STATES)


@on_gpu
def test_a_token_outside_the_table_gives_nan_alone():
    args = arguments(build(dtype=BF16, device="cuda"), 9)
    args[0][4] = 96
    rows = torch.ops.ternary.decode(*args).isnan().all(1).tolist()
    assert rows == [i == 4 for i in range(9)]


@on_gpu
@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (F32, {}, "serves activations in 16 bits; found batch 3, d_model 256"),
        (BF16, {"d_model": 36, "headdim": 8}, "serves d_model a multiple of 8; found batch 3, d_model 36"),
    ],
)
def test_the_gpu_refuses(dtype, options, message):
    model = build(TernaryConfig(group_size="row"), dtype, "cuda", **options)
    assert not Decoder.supports(model, 3)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ternary.decode(*arguments(model, 3))


@pytest.mark.parametrize("options", [{"conv_bias": False}, {"dt_limit": (0.01, 0.05)}, {"headdim": 64}])
def test_options(device, options):
    args = arguments(build(dtype=BF16, device=device, **options), 3)
    y, expected = torch.ops.ternary.decode(*copied(args)), reference.decode(*copied(args))
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("state_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_on_the_cpu_it_is_one_operator_after_another(dtype, state_dtype, scale_dtype):
    for group, embedding, batch in [(128, "int8", 1), ("row", "float", 3), ("tensor", "int8", 8)]:
        ternary = TernaryConfig(group_size=group, embedding=embedding, scale_dtype=scale_dtype)
        ours = arguments(build(ternary, dtype, headdim=16), batch, state_dtype)
        theirs = copied(ours)
        y = torch.ops.ternary.decode(*ours)
        assert torch.equal(y, reference.decode(*theirs, operators=torch.ops.ternary))
        assert all(torch.equal(ours[i], theirs[i]) for i in STATES)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a8_is_one_operator_after_another(dtype):
    model = build(TernaryConfig(embedding="int8"), dtype)
    a16 = arguments(model, 2)
    for block in model.backbone.layers:
        block.mixer.in_proj.activations = block.mixer.out_proj.activations = "a8"
    ours = arguments(model, 2)
    theirs = copied(ours)
    assert (a16[-1], ours[-1]) == ("a16", "a8")
    assert torch.equal(
        torch.ops.ternary.decode(*ours), reference.decode(*theirs, operators=torch.ops.ternary)
    )
    assert all(torch.equal(ours[i], theirs[i]) for i in STATES)
    assert Decoder.supports(model, 1)
    model.backbone.layers[1].mixer.out_proj.activations = "a16"
    assert not Decoder.supports(model, 1)


def test_any_number_of_threads_gives_the_same():
    args, threads, results = arguments(build(d_model=512), 5), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            ours = copied(args)
            results.append([torch.ops.ternary.decode(*ours), *(ours[i] for i in STATES)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("i", "change", "message"),
    [
        (0, lambda t: t.index_fill(0, torch.tensor([1]), 96), r"tokens\[1\] is 96, expected 0 to 95"),
        (0, lambda t: t.index_fill(0, torch.tensor([2]), -1), r"tokens\[2\] is -1, expected 0 to 95"),
        (3, lambda t: t.bfloat16(), "embedding must be BFloat16, not Float"),
        (4, lambda t: t[:2], "in_codes must have 3 tensors, one a layer, not 2"),
        (5, lambda t: [*t[:2], t[2].float()], r"in_scales\[2\] must be .* Half \[1296, 2\], not Float"),
        (4, lambda t: [c[1:] for c in t], r"in_codes must be \[1296, 64\], not \[1295, 64\]"),
        (5, lambda t: [s[..., :1] for s in t], r"in_scales\[0\] must be contiguous"),
        (5, lambda t: [s.repeat_interleave(64, 1) for s in t], "equal and of a multiple of 4"),
        (8, lambda t: t[:, :2].contiguous(), r"conv_state must be \[3, 3, 3, 768\], not \[3, 2, 3, 768\]"),
        (12, lambda t: t.double(), "ssm_state must be Float, BFloat16 or Half"),
        (20, lambda _: "fp8", "activations must be a16 or a8 on a CPU, not fp8"),
    ],
)
def test_refusals(i, change, message):
    args = arguments(build(), 3)
    args[i] = change(args[i])
    before = copied(args)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ternary.decode(*args)
    assert all(torch.equal(args[j], before[j]) for j in STATES)


@pytest.mark.parametrize("state_dtype", [F32, BF16])
def test_opcheck(state_dtype):
    args = arguments(build(dtype=BF16), 2, state_dtype)
    torch.library.opcheck(torch.ops.ternary.decode.default, tuple(args))


def test_rows_are_independent(device):
    dtype = F32 if device == "cpu" else BF16
    model, tolerance = build(dtype=dtype, device=device), 100 * torch.finfo(dtype).eps
    args = arguments(model, 4)
    together = torch.ops.ternary.decode(*copied(args))
    for i in range(4):
        alone = copied(args)
        alone[0] = alone[0][i : i + 1]
        for j in STATES:
            alone[j] = alone[j][:, i : i + 1].contiguous()
        alone[WORKSPACE] = decode_workspace(model.config, 1, device)
        y = torch.ops.ternary.decode(*alone)
        torch.testing.assert_close(y, together[i : i + 1], rtol=tolerance, atol=tolerance)


# Which kernels run, and how the persistent one is cut

H200 = 132  # multiprocessors
MODELS = {
    "130m": (768, 24),
    "370m": (1024, 32),
    "780m": (1536, 48),
    "1.3b": (2048, 64),
    "2.7b": (2560, 80),
}


def plan(d_model: int, heads: int, batch: int = 1, group: int = 128, state_bytes: int = 4, sms: int = H200):
    return _C.decode_plan(batch, d_model, heads, 64, d_model // group, 2 * d_model // group, state_bytes, sms)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_plan_of_the_published_models(model, batch):
    d_model, heads = MODELS[model]
    found = plan(d_model, heads, batch)
    assert found["kernel"] == "persistent" and found["blocks"] == H200
    assert found["shared_bytes"] <= 227 * 1024 and min(found["depths"]) >= 1
    # Every row of in_proj and out_proj has a block.
    assert found["shared_tiles"] * 16 >= 256 + heads > (found["shared_tiles"] - 1) * 16
    assert found["other_units"] + found["shared_blocks_units"] == 2 * d_model // 8
    assert found["max_units"] * 8 <= 2 * found["warps"]
    assert found["out_tiles"] * 16 * H200 >= d_model


def test_plan_looks_two_layers_ahead_at_batch_1():
    for d_model, heads in list(MODELS.values())[:4]:
        assert plan(d_model, heads)["depths"] == (2, 2, 2, 2)


@pytest.mark.parametrize("batch", [3, 8, 9, 128])
@pytest.mark.parametrize("model", MODELS)
def test_larger_batches_run_by_the_sequence(model, batch):
    assert plan(*MODELS[model], batch) == {"kernel": "sequence", "persistent_expects": "a batch of 1 or 2"}


def test_what_the_persistent_kernel_expects():
    def expects(*sizes: int, **options: int) -> str:
        found = plan(*sizes, **options)
        assert found["kernel"] == "sequence"
        return found["persistent_expects"]

    assert _C.persistent_batch == 2
    assert expects(2048, 64, batch=0) == "a batch of 1 or 2"
    assert "2048" in expects(2176, 68)
    assert "multiples of 8" in expects(256, 4)
    assert expects(2048, 32) == "d_inner = 2 d_model"
    assert "multiprocessors" in expects(2048, 64, sms=20)
    assert expects(2048, 64, sms=64) == "fewer channels a multiprocessor"
