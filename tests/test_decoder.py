"""The Decoder, which has a model's layers run by one operator."""

import copy

import pytest
import torch

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, pack_
from ternary_ssm.decoder import Decoder
from test_decode import BF16, F32, build


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("ternary", "options"),
    [
        ({}, {}),
        ({"embedding": "int8"}, {}),
        ({"embedding": "ternary"}, {}),
        ({"embedding": "ternary", "group_size": "tensor", "scale_dtype": "float32"}, {}),
        ({"group_size": 64}, {"d_state": 64}),
        ({"group_size": "row"}, {"d_model": 192, "headdim": 4}),
    ],
)
def test_decoder_is_the_layers_path(dtype, ternary, options):
    model = build(TernaryConfig(**ternary), dtype, **options)
    assert Decoder.supports(model, 2)
    decoder, prompt = Decoder(model), torch.tensor([[1, 2, 3], [80, 4, 4]])
    caches = [model.empty_cache(2) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(prompt, cache)
        for tokens in torch.tensor([[5, 6], [7, 89], [0, 0]]):
            expected = model(tokens.unsqueeze(1), caches[0]).logits[:, 0]
            hidden = decoder(tokens, caches[1])
            assert torch.equal(model.logits(model.backbone.norm_f(hidden.to(dtype))), expected)
    assert torch.equal(caches[0].conv, caches[1].conv) and torch.equal(caches[0].ssm, caches[1].ssm)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("embedding", ["int8", "ternary"])
def test_generate_on_the_cpu_runs_it(dtype, embedding, monkeypatch):
    model, prompts = build(TernaryConfig(embedding=embedding), dtype), [[1, 2, 3], [80]]
    calls, run = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda *args: calls.append(0) or run(*args))
    tokens = model.generate(prompts, 12)
    assert len(calls) == 11
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log.add_(1)
    changed = model.generate(prompts, 12)
    monkeypatch.setattr(Decoder, "supports", lambda *_: False)
    assert model.generate(prompts, 12) == changed
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log.sub_(1)
    assert model.generate(prompts, 12) == tokens
    assert len(calls) == 22


def test_stacks_are_the_models_tensors():
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with torch.inference_mode():
        decoder = Decoder(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    storages = {t.untyped_storage().data_ptr() for t in model.backbone.layers.state_dict().values()}
    held = [*decoder.stacks.values(), *(t for tensors in decoder.lists.values() for t in tensors)]
    assert storages == {t.untyped_storage().data_ptr() for t in held}
    projections = [model.backbone.layers[i].mixer.in_proj.weight for i in range(3)]
    assert all(a is b for a, b in zip(decoder.lists["in_codes"], projections, strict=True))  # no copy
    model(torch.tensor([[1, 2]])).logits.sum().backward()  # trainable still
    assert model.backbone.layers[2].mixer.D.grad is not None


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, tokens = build(), torch.tensor([1, 2])
        caches = [model.empty_cache(2) for _ in range(2)]
        hidden = Decoder(model)(tokens, caches[0])
        assert torch.equal(
            model.backbone.norm_f(hidden), model.backbone(tokens.unsqueeze(1), caches[1])[:, 0]
        )


def test_a_stacked_model_is_saved_and_copied(tmp_path):
    model = build()
    Decoder(model)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids).logits
        for other in (MambaLM.from_pretrained(tmp_path), copy.deepcopy(model)):
            assert torch.equal(other(ids).logits, expected)


def test_refresh_sees_replaced_and_changed_tensors():
    model, tokens = build(), torch.tensor([3, 4])

    def check() -> None:
        decoder.refresh()
        fresh = Decoder(copy.deepcopy(model))
        caches = [model.empty_cache(2) for _ in range(2)]
        assert torch.equal(decoder(tokens, caches[0]), fresh(tokens, caches[1]))

    decoder = Decoder(model)
    stack, codes = decoder.stacks["norm"], decoder.lists["in_codes"][0]
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log.add_(0.5)  # in place
        check()
        assert decoder.stacks["norm"] is stack
        model.to(BF16)  # every tensor
        check()
        model.backbone.layers[0].mixer.in_proj.weight = torch.zeros_like(codes)  # one tensor
        check()
        other = build(TernaryConfig(group_size="row"), BF16).backbone.layers[0].mixer.in_proj
        for block in model.backbone.layers:
            block.mixer.in_proj = copy.deepcopy(other)  # modules
        check()


@pytest.mark.parametrize(
    "options",
    [
        ("ngroups", 2),
        ("d_conv", 3),
        ("rmsnorm", False),
        ("norm_before_gate", True),
        ("D_has_hdim", True),
        ("bias", True),
    ],
)
def test_unsupported_shapes(options):
    assert Decoder.supports(build(), 1)
    assert not Decoder.supports(build(TernaryConfig(group_size="row"), **dict([options])), 1)


def test_unsupported_models():
    model = build()
    assert [b for b in (0, 1, 2, 9, 300) if Decoder.supports(model, b)] == [1, 2, 9, 300]
    assert not Decoder.supports(build(TernaryConfig(modules=("in_proj",))), 1)
    config = MambaConfig(d_model=256, n_layer=2, vocab_size=90)
    assert not Decoder.supports(MambaLM(config), 1)  # dense
    mamba1 = MambaConfig(d_model=256, n_layer=2, vocab_size=90, ssm_cfg={"layer": "Mamba1"})
    assert not Decoder.supports(pack_(MambaLM(mamba1), TernaryConfig()), 1)
    model.backbone.layers[1].norm.to(BF16)
    assert not Decoder.supports(model, 1)  # layers of different dtypes
    model = build(dtype=BF16)
    model.backbone.embeddings.float()
    assert not Decoder.supports(model, 1)  # a table unlike the layers
