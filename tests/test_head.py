"""head: the norm behind the last layer and the logits, in one operator."""

import re

import pytest
import torch
import torch.nn.functional as F

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, pack_
from ternary_ssm.decoder import Decoder, next_logits

head = torch.ops.ternary.head
HALVES = [torch.bfloat16, torch.float16]
SIZES = [(1, 1, 32), (1, 16, 64), (2, 17, 96), (7, 15, 256), (8, 33, 288), (9, 50, 320), (1, 2113, 768)]
SIZES += [(17, 2111, 2048), (0, 4, 32), (3, 0, 32), (1, 40, 2560), (3, 40, 4416)]
TABLES = ["16 bits", *[torch.float16, torch.bfloat16, torch.float32]]  # or int8 with such scales


def on_gpu(test):
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


def problem(m, v, d, device="cpu", dtype=torch.bfloat16, kind="16 bits"):
    hidden, norm = 5 * torch.randn(m, d, device=device), torch.rand(d, device=device).to(dtype)
    if kind == "16 bits":
        return hidden, norm, torch.randn(v, d, device=device).to(dtype), None
    table = torch.randint(-128, 128, (v, d), dtype=torch.int8, device=device)
    return hidden, norm, table, torch.rand(v, 1, device=device).to(kind)


def assert_close(hidden, norm, table, scale):
    """What the norm gives is rounded to norm's dtype, or for an int8 table to integers of 16 bits; sums are
    fp32, the logits rounded once."""
    logits = head(hidden, norm, table, scale)
    eps, u = torch.finfo(norm.dtype).eps, F.rms_norm(hidden.double(), norm.shape, norm.double(), 1e-5)
    if scale is None:
        weight, u = table.double(), u.to(norm.dtype).double()
        bound = eps * (u.square() @ weight.square().T).sqrt()  # another neighbour where u is a tie
    else:
        weight = table.double() * scale.double()
        largest = u.abs().amax(-1, keepdim=True) if u.numel() else u[:, :1]
        bound = 2**-15 * largest * weight.square().sum(1).sqrt()
    exact = u @ weight.T
    assert (logits.dtype, logits.shape) == (norm.dtype, exact.shape)
    assert ((logits.double() - exact).abs() <= bound + eps * exact.abs() + 1e-3 * eps).all()


# Tiles of 16 rows, on a GPU of 132 multiprocessors; tokens by eights; steps of 32 columns by eight warps.
@on_gpu
@pytest.mark.parametrize("kind", TABLES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m, v, d", SIZES)
def test_matches_reference(m, v, d, dtype, kind):
    assert_close(*problem(m, v, d, "cuda", dtype, kind))


@pytest.mark.parametrize("kind", ["16 bits", torch.float16], ids=str)
def test_is_the_norm_and_the_product(kind):
    hidden, norm, table, scale = problem(3, 17, 64, kind=kind)
    u = F.rms_norm(hidden, (64,), norm.float(), 1e-5).to(norm.dtype)
    weight = table.float() if scale is None else table * scale.float()
    torch.testing.assert_close(head(hidden, norm, table, scale), (u.float() @ weight.T).to(norm.dtype))


@pytest.mark.parametrize("leading", [(), (2, 3), (0, 1)])
def test_takes_any_leading_dimensions(leading, device):
    _, *rest = problem(1, 20, 64, device)
    hidden = torch.randn(*leading, 64, device=device)
    expected = head(hidden.reshape(-1, 64), *rest).reshape(*leading, 20)
    assert torch.equal(head(hidden, *rest), expected)


@on_gpu
@pytest.mark.parametrize("kind", ["16 bits", torch.float16], ids=str)
def test_rows_have_the_bits_that_they_have_alone(kind):
    hidden, *rest = problem(11, 5000, 2048, "cuda", kind=kind)
    logits = head(hidden, *rest)
    assert all(torch.equal(logits, head(hidden, *rest)) for _ in range(5))
    assert all(torch.equal(head(hidden[i : i + 1], *rest)[0], logits[i]) for i in range(11))
    hidden[3] = torch.nan
    again = head(hidden, *rest)
    assert again[3].isnan().all()
    again[3] = logits[3]
    assert torch.equal(again, logits)


@on_gpu
@pytest.mark.parametrize("embedding", ["float", "int8", "ternary"])
@pytest.mark.parametrize("batch", [1, 3, 8, 9, 65])
def test_a_step_of_decoding_takes_it(batch, embedding):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=256, n_layer=2, vocab_size=90, ssm_cfg={"headdim": 32}))
    model = pack_(model, TernaryConfig(embedding=embedding)).to("cuda", torch.float16).eval()
    tokens = torch.arange(batch, device="cuda")
    with torch.inference_mode():
        ours = next_logits(model, Decoder(model), tokens, model.empty_cache(batch))
        plain = next_logits(model, None, tokens, model.empty_cache(batch))
    torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.02 * plain.abs().max().item())


def test_opcheck(device):
    for kind in ("16 bits", torch.float16):
        torch.library.opcheck(head.default, problem(3, 40, 64, device, kind=kind))


@on_gpu
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=torch.ones(2, 64).half()), "hidden must be Float, not Half"),
        (dict(hidden=torch.ones(2, 60)), "hidden must have 64 columns, as norm, not [2, 60]"),
        (dict(norm=torch.ones(64)), "norm must be BFloat16 or Half on this device, not Float"),
        (dict(norm=torch.ones(1, 64).half()), "norm must have 1 dimensions, not 2"),
        (dict(table=torch.ones(20, 64)), "table must be Half, not Float"),
        (dict(table=torch.ones(20, 63).half()), "table must be [20, 64], not [20, 63]"),
        (dict(table=torch.ones(64, 20).half().T), "table must be contiguous"),
        (dict(scale=torch.ones(20, 1)), "table must be Char, not Half"),
        (dict(table=torch.ones(20, 64).char(), scale=torch.ones(20)), "scale must be [20, 1], not [20]"),
        (dict(table=torch.ones(20 * 64 + 1).half()[1:].view(20, 64)), "table must start at a multiple of 16"),
        (
            dict(hidden=torch.ones(2, 48), norm=torch.ones(48).half(), table=torch.ones(20, 48).half()),
            "serves rows of a multiple of 32 up to 4416; found 48",
        ),
    ],
)
def test_refuses(change, message):
    args = dict(
        zip(("hidden", "norm", "table", "scale"), problem(2, 20, 64, dtype=torch.float16), strict=True)
    )
    moved = {name: t if t is None else move(t) for name, t in (args | change).items()}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        head(**moved)


def move(t: torch.Tensor) -> torch.Tensor:
    """To the GPU, with its strides and its offset."""
    whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0).to("cuda")
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())
