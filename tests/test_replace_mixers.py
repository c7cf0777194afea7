"""replace_mixers_: the models of transformers and mamba_ssm say with our mixers what they said before."""

import copy

import pytest
import torch
from torch import nn

from ternary_ssm import TernaryConfig, pack_
from ternary_ssm.layers import Mamba, Mamba2, TernaryLinear
from ternary_ssm.surgery import replace_mixers_
from test_surgery import mamba_ssm_model
from test_surgery import transformers_model as transformers_model_somewhere

MODES = ["dense", "packed"]


def transformers_model(layer: str) -> nn.Module:
    return transformers_model_somewhere(layer).cpu()  # where transformers calls no kernels of others


@pytest.fixture(params=["Mamba1", "Mamba2"])
def layer(request) -> str:
    return request.param


def randomized(model: nn.Module, mode: str) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".D", "bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            if "embedding" in name:
                parameter.mul_(20)
    return (pack_(model, TernaryConfig(group_size=32)) if mode == "packed" else model).eval()


def pair(host, layer: str, mode: str) -> tuple[nn.Module, nn.Module]:
    theirs = randomized(host(layer), mode)
    for module in theirs.modules():  # mamba_ssm's fused paths ask for causal_conv1d
        for name in {"use_mem_eff_path", "use_fast_path"} & vars(module).keys():
            setattr(module, name, False)
    ours = replace_mixers_(copy.deepcopy(theirs))
    assert sum(isinstance(m, Mamba | Mamba2) for m in ours.modules()) == 2
    assert sum(isinstance(m, TernaryLinear) for m in ours.modules()) == (4 if mode == "packed" else 0)
    a, b = theirs.state_dict(), ours.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return theirs, ours


def ids_and_mask(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 14, 9 and 2 tokens, padded at the left."""
    ids = torch.randint(1, 90, (3, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :12] = 0
    return (ids * mask).to(device), mask.to(device)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_transformers_logits(layer, mode):
    theirs, ours = pair(transformers_model, layer, mode)
    ids, mask = ids_and_mask(theirs.device)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    a, b = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_transformers_generate(layer, mode, options):
    theirs, ours = pair(transformers_model, layer, mode)
    ids, mask = ids_and_mask(theirs.device)
    options |= {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    options["pad_token_id"] = 0
    out = ours.generate(ids, **options)
    assert torch.equal(out, theirs.generate(ids, **options))
    alone = ours.generate(ids[2:, 12:], **options | {"attention_mask": mask[2:, 12:]})
    assert torch.equal(alone[0], out[2, 12:])


@torch.no_grad()
def test_transformers_cache_goes_on_by_pieces(layer):
    _, ours = pair(transformers_model, layer, "packed")
    ids = torch.arange(40).reshape(2, 20).to(ours.device)
    expected, cache, pieces = ours(ids).logits, None, []
    for piece in ids.split([7, 1, 1, 2, 1, 8], dim=1):
        out = ours(piece, cache_params=cache, use_cache=True)
        cache = out.cache_params
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


def test_transformers_trains(layer):
    theirs, ours = pair(transformers_model, layer, "dense")
    ids, _ = ids_and_mask(theirs.device)
    for model in (theirs, ours):
        model.train()(ids, labels=ids).loss.backward()
    grads = dict(ours.named_parameters())
    for name, a in theirs.named_parameters():
        b = grads[name]
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3 * a.grad.abs().max().item(), msg=name)


def test_transformers_in_16_bits_and_saved(layer, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = randomized(transformers_model(layer), "dense").bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(ids_and_mask(theirs.device)[0]).logits
        ours = replace_mixers_(theirs)
        logits = ours(ids_and_mask(theirs.device)[0]).logits
    assert ours.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert (logits - expected).norm() < 0.03 * expected.norm()
    ours.save_pretrained(tmp_path / "ours")
    load = transformers.AutoModelForCausalLM.from_pretrained
    a, b = (load(tmp_path / name, dtype=torch.bfloat16).state_dict() for name in ("theirs", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_mamba_ssm(layer, mode):
    theirs, ours = pair(mamba_ssm_model, layer, mode)
    ids, _ = ids_and_mask(next(theirs.parameters()).device)
    if (layer, mode) != ("Mamba1", "packed"):  # theirs reads in_proj.weight raw
        with torch.no_grad():
            expected = theirs(ids).logits
            assert (ours(ids).logits - expected).norm() < 0.01 * expected.norm()  # its kernels round to tf32
    for cg in (False, True):
        out = ours.generate(ids, max_length=30, top_k=1, cg=cg)
        with torch.no_grad():
            logits = ours(out).logits  # the tokens that whole sequences would have chosen
        assert torch.equal(logits[:, 13:-1].argmax(-1), out[:, 14:])


def test_refusals():
    with pytest.raises(ValueError, match="Linear has no mixers of transformers or mamba_ssm"):
        replace_mixers_(nn.Linear(2, 2))
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=90, hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        replace_mixers_(transformers.MambaForCausalLM(config))
    model = transformers_model("Mamba2")
    with pytest.raises(ValueError, match="config is None, expected transformers' or mamba_ssm's"):
        replace_mixers_(nn.Sequential(model))
