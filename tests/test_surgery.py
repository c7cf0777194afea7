"""quantize_ and pack_ on our models, transformers' and mamba_ssm's."""

import copy
import sys

import pytest
import torch
from torch import nn

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, pack_, quantize_
from ternary_ssm.layers import Int8Table, TernaryLinear
from ternary_ssm.reference import ReferenceMode
from ternary_ssm.surgery import quantized_layers

TERNARY = TernaryConfig(group_size=32)
CLOSE = {"rtol": 1e-3, "atol": 3e-4}  # of logits up to 1: packed products take 16 bits of activations
HOST_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the hosts' fused paths are on the GPU alone


def own_model(layer: str, **options) -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(
        MambaConfig(d_model=64, n_layer=2, vocab_size=90, ssm_cfg={"layer": layer, "d_state": 16}, **options)
    )


def transformers_model(layer: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 90, "state_size": 16}
    if layer == "Mamba1":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**shape)).to(HOST_DEVICE)
    config = transformers.Mamba2Config(
        **shape, num_heads=8, head_dim=16, n_groups=1
    )  # strides causal_conv1d takes
    return transformers.Mamba2ForCausalLM(config).to(HOST_DEVICE)


def mamba_ssm_model(layer: str) -> nn.Module:
    pytest.importorskip("mamba_ssm")
    from mamba_ssm.models.config_mamba import MambaConfig as Config
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    shape = {"d_state": 16} if layer == "Mamba1" else {"d_state": 16, "headdim": 16}  # as causal_conv1d asks
    config = Config(d_model=64, n_layer=2, vocab_size=90, ssm_cfg={"layer": layer} | shape)
    return MambaLMHeadModel(config, device=HOST_DEVICE, dtype=torch.float32)


HOSTS = [
    pytest.param(own_model, id="own"),
    pytest.param(transformers_model, id="transformers"),
    pytest.param(mamba_ssm_model, id="mamba_ssm", marks=pytest.mark.cuda),
]


@pytest.fixture(params=["Mamba1", "Mamba2"])
def layer(request):
    return request.param


@pytest.fixture(params=HOSTS)
def model(request, layer):
    return request.param(layer)


def logits(model: nn.Module, length: int = 12) -> torch.Tensor:
    ids = torch.arange(2 * length).reshape(2, length) % 90
    return model(ids.to(next(model.parameters()).device)).logits


def latents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.parametrizations.weight.original for name, layer in quantized_layers(model)}


def test_projections_become_ternary_and_nothing_else_moves(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantize_(model, TERNARY)
    names = [name for name, _ in quantized_layers(model)]
    assert len(names) == 4 and all(name.endswith(("in_proj", "out_proj")) for name in names)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name.replace("parametrizations.weight.original", "weight")])
    for _, linear in quantized_layers(model):
        values = linear.weight.reshape(linear.out_features, -1, 32)
        scale = values.abs().amax(-1, keepdim=True)
        assert ((values == 0) | (values.abs() == scale)).all() and 0.2 < (values == 0).float().mean() < 0.6


@pytest.mark.parametrize("train", [False, True])
def test_no_path_of_the_host_sees_the_latent_weight(model, train):
    quantize_(model, TERNARY).train(train)
    expected = logits(model)
    for name, linear in quantized_layers(model):
        latent, codes = latents(model)[name].detach(), linear.weight.sign()
        before = latent.clone()
        for row in range(linear.out_features):
            # Two weights of one group that have the same code change places: scale and codes stay.
            a, b = (codes[row, :32] == codes[row, 0]).nonzero().flatten()[[0, -1]].tolist()
            latent[row, [a, b]] = latent[row, [b, a]]
        assert (latent != before).sum() > linear.out_features and torch.equal(linear.weight.sign(), codes)
    assert torch.equal(logits(model), expected)


def test_gradients_go_straight_through_to_fp32_latents(model):
    if "mamba_ssm" in type(model).__module__ and not hasattr(sys.modules["selective_scan_cuda"], "bwd"):
        pytest.skip("this selective_scan_cuda has the forward pass alone")
    quantize_(model.to(torch.bfloat16) if isinstance(model, MambaLM) else model, TERNARY)
    logits(model).float().square().mean().backward()
    for name, latent in latents(model).items():
        assert latent.dtype == torch.float32 and latent.grad.dtype == torch.float32
        assert latent.grad.abs().sum() > 0 and latent.grad.isfinite().all(), name


def test_packed_equals_trained(model, layer):
    theirs = "mamba_ssm" in type(model).__module__
    if theirs and layer == "Mamba1":
        pytest.skip("it reads in_proj.weight raw: replace_mixers_ is for that")
    quantize_(model, TERNARY).eval()
    with torch.no_grad():
        if isinstance(model, MambaLM):
            with ReferenceMode():
                trained = logits(model)
                packed_bits = logits(pack_(copy.deepcopy(model)))
            assert torch.equal(packed_bits, trained)  # bit for bit on reference arithmetic
        trained = logits(model)
        packed = logits(pack_(model))
        assert (packed - trained).norm() <= (0.01 if theirs else 3e-4) * trained.norm()  # theirs: tf32
    assert all(isinstance(linear, TernaryLinear) for _, linear in quantized_layers(model))


def test_packing_a_dense_model_rounds_it(layer):
    model = own_model(layer)
    trained = quantize_(copy.deepcopy(model), TERNARY)
    packed = pack_(model, TERNARY)
    assert packed.ternary == TERNARY
    with torch.no_grad():
        torch.testing.assert_close(logits(packed), logits(trained), **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_tables(layer, tied):
    model = own_model(layer, tie_embeddings=tied)
    dense = logits(pack_(copy.deepcopy(model), TERNARY))
    packed = pack_(model, TernaryConfig(group_size=32, embedding="int8"))
    assert isinstance(packed.backbone.embeddings, Int8Table)
    assert (packed.lm_head is None) if tied else isinstance(packed.lm_head, Int8Table)
    error = (logits(packed) - dense).norm() / dense.norm()
    assert 0 < error < 0.02


def test_filter_chooses_layers():
    model = own_model("Mamba1")
    pack_(model, TERNARY, filter_fn=lambda module, name: name.endswith("layers.1.mixer.in_proj"))
    assert [name for name, _ in quantized_layers(model)] == ["backbone.layers.1.mixer.in_proj"]
    assert model.ternary.modules == ("backbone.layers.1.mixer.in_proj",)


def test_all_projections_of_mamba1_can_be_ternary():
    modules = ("in_proj", "x_proj", "dt_proj", "out_proj")
    config = TernaryConfig(group_size="row", modules=modules)
    model = quantize_(own_model("Mamba1"), config)
    with torch.no_grad():
        trained = logits(model)
        torch.testing.assert_close(logits(pack_(model)), trained, **CLOSE)


def test_casts_leave_scales_and_dynamics_alone(layer):
    model = pack_(own_model(layer), TERNARY).to(torch.bfloat16)
    mixer = model.backbone.layers[0].mixer
    assert mixer.A_log.dtype == torch.float32 and mixer.in_proj.weight_scale.dtype == torch.float16
    assert mixer.conv1d.weight.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16


def test_refusals():
    with pytest.raises(ValueError, match="no Linear of MambaLM was chosen"):
        quantize_(own_model("Mamba2"), TERNARY, filter_fn=lambda module, name: False)
    with pytest.raises(ValueError, match="in_proj: group_size=128 does not divide in_features=64"):
        quantize_(own_model("Mamba2"), TernaryConfig(group_size=128))
    model = quantize_(own_model("Mamba2"), TERNARY)
    with pytest.raises(ValueError, match=r"in_proj.weight is parametrized already"):
        quantize_(model, TERNARY)
    with pytest.raises(ValueError, match="pack_ was given"):
        pack_(model, TernaryConfig(group_size=64))
    with pytest.raises(ValueError, match="the model is not quantized"):
        pack_(own_model("Mamba2"))
