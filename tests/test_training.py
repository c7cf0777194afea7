"""How models run under autograd: recomputation, the fused forms, the frozen teacher, its products in fp8."""

import copy
import weakref
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, quantize_, training
from ternary_ssm.fp8 import Fp8Linear, fp8_
from ternary_ssm.loss import distillation_loss

CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("mamba_ssm") is None, reason="no GPU or no mamba_ssm"
    ),
]


def make_model(layer: str = "Mamba2", n_layer: int = 3, **settings) -> MambaLM:
    torch.manual_seed(0)
    sizes = {"headdim": 32} if layer == "Mamba2" else {}
    ssm_cfg = {"layer": layer, "d_state": 16} | sizes
    return MambaLM(MambaConfig(d_model=64, n_layer=n_layer, vocab_size=100, ssm_cfg=ssm_cfg, **settings))


def gradients(model: MambaLM, recompute: float, ids: torch.Tensor, autocast: bool = False) -> dict:
    model.zero_grad()
    model.backbone.recompute = recompute
    with parametrize.cached():
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            hidden = model.backbone(ids)
        direction = torch.linspace(-1, 1, hidden.numel(), device=ids.device).view_as(hidden)
        (hidden.float() * direction).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Count(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_a_compiled_step_is_one_graph_with_the_same_gradients(layer):
    teacher = make_model(layer, n_layer=1)
    student = quantize_(copy.deepcopy(teacher), TernaryConfig(group_size=64))
    ids, heads = torch.randint(100, (2, 6)), [m.backbone.embeddings.weight for m in (student, teacher)]

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = teacher.backbone(ids[:, :-1])
        return distillation_loss(student.backbone(ids[:, :-1]), hidden, *heads, ids[:, 1:])[0]

    compiled, found = torch.compile(step, backend="aot_eager", fullgraph=True), []
    for function in (step, compiled):
        student.zero_grad()
        function(ids).backward()
        found.append([p.grad.clone() for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_recomputing_changes_no_gradient(layer):
    model, ids = quantize_(make_model(layer), TernaryConfig(32)), torch.randint(100, (2, 9))
    expected = gradients(model, 0.0, ids)
    for share, blocks in ((0.4, 1), (1.0, 3)):
        with Count() as count:
            found = gradients(model, share, ids)
        assert all(torch.equal(found[name], grad) for name, grad in expected.items())
        assert count.calls["fake_quantize"] == 6  # once a step, also where backward runs the forward again
        assert count.calls["causal_conv1d"] == 3 + blocks


def test_the_gated_norm_is_not_computed_twice():
    model, ids = make_model(), torch.randint(100, (2, 9))
    with Count() as count:
        gradients(model, 0.0, ids)
    assert "rms_norm_gated" not in count.calls
    with Count() as count, torch.no_grad():
        model(ids)
    assert count.calls["rms_norm_gated"] == 3


def test_dropped_tensors_are_computed_again_and_freed():
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    calls, alive = [], []

    def wide(x):
        return (2 * x).exp()

    def again():
        calls.append(wide(x))
        alive.append(weakref.ref(calls[-1].untyped_storage()))
        return [calls.pop()]

    def loss(drop: bool):
        y = wide(x)
        dropped = training.Dropped(again)
        if not drop:
            return F.linear(y[1:], weight).sin().sum()
        with torch.autograd.graph.saved_tensors_hooks(dropped.pack, dropped.unpack):
            dropped.add(y)
            return F.linear(y[1:], weight).sin().sum() + y.square().sum() * 0

    expected = torch.autograd.grad(loss(False), (x, weight))
    result = loss(True)
    for _ in range(2):
        found = torch.autograd.grad(result, (x, weight), retain_graph=True)
        assert all(map(torch.equal, found, expected))
    assert len(alive) == 2 and all(ref() is None for ref in alive)


@pytest.mark.parametrize("settings", [{}, {"residual_in_fp32": False}, {"rms_norm": False}])
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_a_frozen_model_gives_the_same(layer, settings):
    model, ids = make_model(layer, **settings).requires_grad_(False), torch.randint(100, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(training.frozen(model.backbone, ids), model.backbone(ids))
        exact = model.backbone(ids)
        error = (training.frozen(copy.deepcopy(model).bfloat16().backbone, ids).float() - exact).norm()
    assert error < 0.03 * exact.norm()


def test_fp8_projections(device="cpu"):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(96, 48, device=device), torch.randn(2, 5, 96, device=device)
    x[0, 0], x[1, 2] = 0, 1e6
    y, exact = Fp8Linear(linear)(x), linear(x)
    assert y.shape == exact.shape and torch.equal(y[0, 0], linear.bias)
    for row, true in zip(y.flatten(0, 1), exact.flatten(0, 1), strict=True):
        assert (row - true).norm() <= 0.05 * (true - linear.bias).norm() + 1e-6  # e4m3 errs by up to 2^-4
    model, ids = make_model().requires_grad_(False), torch.randint(100, (2, 9))
    with torch.inference_mode():
        exact, found = model.backbone(ids), fp8_(model).backbone(ids)
    assert 0 < (found - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("embedding", [None, "float", "ternary"])
@pytest.mark.parametrize("settings", [{}, {"ngroups": 2}, {"D_has_hdim": True}, {"dt_limit": [0.01, 0.1]}])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_the_fused_form_has_the_gradients_of_the_plain_one(device, share, embedding, settings):
    torch.manual_seed(0)
    ssm_cfg = {"layer": "Mamba2", "d_state": 64, "headdim": 64} | settings
    model = MambaLM(MambaConfig(d_model=256, n_layer=2, vocab_size=100, ssm_cfg=ssm_cfg), device=device)
    if embedding is not None:
        quantize_(model, TernaryConfig(32, embedding=embedding))
    ids = torch.randint(100, (2, 300), device=device)
    exact = gradients(model, 0.0, ids)
    plain, training_is_fused = {}, training.is_fused
    with torch.autocast("cuda", torch.bfloat16):
        assert training.is_fused(model.backbone, ids)
    try:
        training.is_fused = lambda *_: False
        plain = gradients(model, 0.0, ids, autocast=True)
    finally:
        training.is_fused = training_is_fused
    fused = gradients(model, share, ids, autocast=True)
    for name, true in exact.items():
        error, allowed = (fused[name] - true).norm(), (plain[name] - true).norm()
        assert error <= 2 * allowed + 0.02 * true.norm(), name
