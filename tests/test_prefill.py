"""prefill, the operator of whole sequences through all layers."""

import pytest
import torch

import test_decode
from ternary_ssm import MambaLM, TernaryConfig
from ternary_ssm.decoder import Decoder
from test_decode import BF16, F16, F32, build, copied, on_gpu

STATES = (9, 13)  # the arguments conv_state and ssm_state


def arguments(model: MambaLM, *lengths: int, batch=0, state_dtype=F32) -> list:
    """Those of the operator for sequences end to end, or for `batch` rows of one length."""
    seen = []
    rows, length = (batch, *lengths) if batch else (1, sum(lengths))
    cache = model.empty_cache(batch or len(lengths), state_dtype)
    cache.conv.fill_(torch.nan)  # states are only written
    cache.ssm.fill_(torch.nan)
    ids = torch.randint(90, (rows, length), device=model.device)
    bounds = torch.tensor([0, *lengths], device=model.device).cumsum(0).int()
    original, torch.ops.ternary.prefill = torch.ops.ternary.prefill, lambda *args: seen.extend(args)
    try:
        Decoder(model).prefill(ids, cache, None if batch else bounds)
    finally:
        torch.ops.ternary.prefill = original
    return seen


def check_against_the_reference(args: list) -> None:
    test_decode.check_against_the_reference(args, "prefill", STATES, torch.norm)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("ternary", "options"),
    [
        (TernaryConfig(), {}),
        (TernaryConfig(group_size="row", embedding="int8"), {"d_state": 64}),
        (TernaryConfig(group_size=32, embedding="ternary"), {"d_state": 16, "headdim": 64}),
    ],
)
@pytest.mark.parametrize("lengths", [(1,), (63, 64, 65), (130,)])
def test_reference(lengths, ternary, options, dtype, device):
    model = build(ternary, dtype, device, n_layer=2, **options)
    check_against_the_reference(arguments(model, *lengths))


@pytest.mark.parametrize("state_dtype", [F32, BF16])
def test_rows_of_one_length(state_dtype, device):
    model = build(dtype=BF16, device=device, n_layer=2)
    check_against_the_reference(arguments(model, 70, batch=3, state_dtype=state_dtype))


@on_gpu
@pytest.mark.parametrize("lengths", [(512,), (1000, 1, 600), (4096,)])
def test_real_widths(lengths):
    model = build(dtype=BF16, device="cuda", d_model=2048, n_layer=2, headdim=64)
    check_against_the_reference(arguments(model, *lengths))


@on_gpu
def test_fp8_is_near():
    model = build(dtype=BF16, device="cuda", d_model=512)
    args = arguments(model, 300)
    exact = torch.ops.ternary.prefill(*copied(args))
    rounded = torch.ops.ternary.prefill(*copied(args[:-1]), "fp8")
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < 0.1


@on_gpu
def test_same_bits_each_time():
    args = arguments(build(dtype=F16, device="cuda", d_model=512), 700, 30)
    results = []
    for _ in range(3):
        ours = copied(args)
        results.append([torch.ops.ternary.prefill(*ours), *(ours[i] for i in STATES)])
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


def test_goes_on_by_decoding(device):
    """What decode makes of the states behind a prefix is what prefill makes of the whole."""
    dtype = F32 if device == "cpu" else BF16
    model = build(dtype=dtype, device=device)
    decoder, ids = Decoder(model), torch.randint(90, (2, 40), device=device)
    cache, whole = model.empty_cache(2), model.empty_cache(2)
    hidden = decoder.prefill(ids, whole)
    decoder.prefill(ids[:, :30].contiguous(), cache)
    for i in range(30, 40):
        y = decoder(ids[:, i].contiguous(), cache)
        # a CPU's products round fp32 to 16 bits, where the last bits of what comes in may decide
        tolerance = 2**-13 if device == "cpu" else 100 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, hidden[:, i], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("embedding", ["int8", "ternary"])
def test_is_the_layers_path(dtype, embedding):
    model = build(TernaryConfig(embedding=embedding), dtype)
    ids, bounds = torch.randint(90, (1, 20)), torch.tensor([0, 12, 20], dtype=torch.int32)
    caches = [model.empty_cache(2) for _ in range(2)]
    with torch.inference_mode():
        layers = model(ids, caches[0], bounds).logits
        hidden = Decoder(model).prefill(ids, caches[1], bounds).to(dtype)
        logits = model.logits(model.backbone.norm_f(hidden))
    assert torch.equal(logits, layers)
    assert torch.equal(caches[0].conv, caches[1].conv) and torch.equal(caches[0].ssm, caches[1].ssm)


@on_gpu
@pytest.mark.parametrize(
    ("i", "change", "message"),
    [
        (0, lambda t: t[0], "tokens must have 2 dimensions, not 1"),
        (0, lambda t: t[:, :0], "an empty tensor among norm"),
        (1, lambda t: t[:1], "cu_seqlens must have at least 2 elements, not 1"),
        (2, lambda t: t.half(), "embedding must be BFloat16, not Half"),
        (
            9,
            lambda t: t[..., :2, :].contiguous(),
            r"conv_state must be \[3, 2, 3, 768\], not \[3, 2, 2, 768\]",
        ),
        (13, lambda t: t.double(), "ssm_state must be Float, BFloat16 or Half"),
        (20, lambda _: "a8", "activations must be a16 or fp8, not a8"),
    ],
)
def test_refusals(i, change, message):
    args = arguments(build(dtype=BF16, device="cuda"), 20, 13)
    args[i] = change(args[i])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ternary.prefill(*args)
    assert all(args[j].isnan().all() for j in STATES)


@on_gpu
def test_tokens_outside_the_table_give_nan():
    args = arguments(build(dtype=BF16, device="cuda"), 9, 7)
    args[0][0, 4] = 96  # the table is padded to this
    rows = torch.ops.ternary.prefill(*args).isnan().all(-1)[0].tolist()
    assert rows[4] and not any(rows[9:])  # of the same sequence only


def test_opcheck(device):
    args = arguments(build(dtype=BF16, device=device, n_layer=1), 7, 5)  # copies of more were no stack
    args = [torch.zeros_like(a) if i in STATES else a for i, a in enumerate(args)]
    torch.library.opcheck(torch.ops.ternary.prefill.default, tuple(args))
