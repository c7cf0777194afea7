import copy
import math
import sys
import warnings
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, runs
from ternary_ssm.data import DataError, TokenStream
from ternary_ssm.distill import DistillConfig, Distiller, DistillError, distill, distillation_loss
from ternary_ssm.evaluate import nats_per_token
from ternary_ssm.layers import TernaryLinear
from ternary_ssm.quantizer import FakeQuantize
from ternary_ssm.surgery import quantized_layers

VOCAB, LENGTH, BATCH = 128, 16, 4
TERNARY = TernaryConfig(group_size=32)


@pytest.fixture(autouse=True)
def one_thread():
    """Small models are many times slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_teacher(seed: int = 0, layer: str = "Mamba2") -> MambaLM:
    torch.manual_seed(seed)
    sizes = {"headdim": 32} if layer == "Mamba2" else {}
    model = MambaLM(
        MambaConfig(d_model=64, n_layer=2, vocab_size=VOCAB, ssm_cfg={"layer": layer, "d_state": 16} | sizes)
    )
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(15)  # logits of order 1: a teacher with opinions
    return model


def make_distiller(out: Path, steps: int = 6, seed: int = 0, data_seed: int = 0, **options) -> Distiller:
    """Also run by the process that a test kills."""
    teacher = make_teacher(seed, options.pop("layer", "Mamba2"))
    tokens = np.random.RandomState(data_seed).randint(0, VOCAB, 500).astype(np.uint16)
    eval_tokens = options.pop("eval_tokens", None)
    ternary = options.pop("ternary", TERNARY)
    more = {name: options.pop(name) for name in ("teacher_cache", "document_ends") if name in options}
    options = {"learning_rate": 3e-3, "log_every": 1, "save_every": 2, "monitor_every": 1} | options
    config = DistillConfig(ternary, steps * BATCH * LENGTH, LENGTH, BATCH, **options)
    stream = TokenStream(tokens, LENGTH, BATCH, config.seed)
    return Distiller(teacher, stream, config, out, eval_tokens, **more)


def logged(out: Path) -> list[dict]:
    """The metrics but for times, which differ from run to run."""
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in runs.read_metrics(out)]


# --- loss ---------------------------------------------------------------------------------------------------


def plain_loss(hidden_s, hidden_t, head_s, head_t, labels, kl_weight, temperature):
    s, t = hidden_s @ head_s.T, hidden_t @ head_t.T
    log_s, log_t = (F.log_softmax(v / temperature, -1).flatten(0, -2) for v in (s, t))
    kl = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    ce = F.cross_entropy(s.flatten(0, -2), labels.flatten())
    return kl_weight * temperature**2 * kl + (1 - kl_weight) * ce, kl, ce


def loss_inputs(dtype=torch.float64, v=33):
    g = torch.Generator().manual_seed(1)
    shapes = ((3, 7, 16), (3, 7, 24), (v, 16), (v, 24))  # the teacher is wider
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    for i in (0, 2):
        tensors[i].requires_grad_(True)
    return [*tensors, torch.randint(v, (3, 7), generator=g)]


@pytest.mark.parametrize("chunk", [1, 4, 20, 21, 1024])
@pytest.mark.parametrize(("kl_weight", "temperature"), [(0.5, 1.0), (0.3, 2.0), (0.0, 1.0), (1.0, 0.7)])
def test_loss_and_gradients_match_the_plain_form(chunk, kl_weight, temperature):
    ours, plain = loss_inputs(), loss_inputs()
    losses = distillation_loss(*ours, kl_weight, temperature, chunk)
    expected = plain_loss(*plain, kl_weight, temperature)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    (3 * losses[0]).backward()  # 3: the incoming gradient counts
    (3 * expected[0]).backward()
    for i in (0, 2):
        torch.testing.assert_close(ours[i].grad, plain[i].grad, rtol=1e-11, atol=1e-13)


def test_loss_of_equal_models_is_cross_entropy_alone():
    hidden, _, head, _, labels = loss_inputs()
    _, kl, _ = distillation_loss(hidden, hidden.detach(), head, head.detach(), labels)
    assert abs(kl.item()) < 1e-12


def test_loss_holds_the_logits_of_one_chunk_only():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    hidden, head, labels = torch.randn(200, 4), torch.randn(100, 4), torch.randint(100, (200,))
    hidden.requires_grad_(), head.requires_grad_()
    with Watch():
        distillation_loss(hidden, hidden.detach(), head, head.detach(), labels, chunk=8)[0].backward()
    assert largest == 8 * 100  # also the size of hidden; all logits at once would be 20000


def test_loss_under_autocast_is_close_and_its_gradients_are_fp32():
    exact, low = loss_inputs(), loss_inputs(torch.float32)
    expected = plain_loss(*exact, 0.5, 1.0)
    expected[0].backward()
    with torch.autocast("cpu", torch.bfloat16):
        hidden_t, head_t = low[1].bfloat16(), low[3].bfloat16()
        losses = distillation_loss(low[0], hidden_t, low[2], head_t, low[4], chunk=8)
    losses[0].backward()
    for ours, true in zip(losses, expected, strict=True):
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(true.item(), rel=0.02)
    for i in (0, 2):
        assert low[i].grad.dtype == torch.float32
        assert (low[i].grad - exact[i].grad).norm() < 0.02 * exact[i].grad.norm()


def test_loss_refuses_other_vocabularies():
    hidden_s, hidden_t, head_s, head_t, labels = loss_inputs()
    with pytest.raises(ValueError, match="the student has 33 logits, the teacher 32"):
        distillation_loss(hidden_s, hidden_t, head_s, head_t[:32], labels)


# --- config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("tokens", "sequence_length", "batch_size", "log_every", "save_every")),
        *(("learning_rate", v) for v in (0, -1.0, math.inf, math.nan)),
        *(("kl_weight", -0.1), ("min_lr_ratio", 1.1), ("warmup_ratio", math.nan), ("weight_decay", -1.0)),
        *(("temperature", 0), ("grad_clip", 0), ("seed", -1), ("seed", 2**32), ("dtype", "float16")),
    ],
)
def test_config_refuses(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*expected"):
        DistillConfig(**({"ternary": TERNARY, "tokens": 100} | {name: value}))


def test_learning_rate_warms_up_and_decays_to_its_floor():
    c = DistillConfig(TERNARY, 100 * 64 - 1, 16, 4, learning_rate=1.0, warmup_ratio=0.1, min_lr_ratio=0.2)
    assert c.steps == 100  # rounded up
    rates = [c.learning_rate_at(step) for step in range(c.steps)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.2)
    one = DistillConfig(TERNARY, 1, warmup_ratio=0.0)
    assert one.learning_rate_at(0) == pytest.approx(2.5e-4)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_gradients_go_straight_through_to_the_latent_weights(tmp_path, layer):
    d = make_distiller(tmp_path, grad_clip=1e9, layer=layer)
    dense = copy.deepcopy(d.teacher).requires_grad_(True)  # the same model with the rounded weights in it
    name = "layers.1.mixer.in_proj"
    layer_s, layer_d = d.student.backbone.get_submodule(name), dense.backbone.get_submodule(name)
    for n, m in d.student.backbone.named_modules():
        if isinstance(m, torch.nn.Linear) and hasattr(m, "parametrizations"):
            dense.backbone.get_submodule(n).weight.data = m.weight.detach().clone()
    assert layer_d.weight.unique().numel() < layer_d.weight.numel() / 10
    latent = layer_s.parametrizations.weight.original
    grads = []
    d.optimizer.step = lambda: grads.append(latent.grad.clone())
    d.train_step()
    ids = d.stream.batch(0)
    hidden, hidden_t = dense.backbone(ids[:, :-1]), d.teacher.backbone(ids[:, :-1])
    heads = dense.backbone.embeddings.weight, d.teacher.backbone.embeddings.weight
    plain_loss(hidden, hidden_t, *heads, ids[:, 1:], 0.5, 1.0)[0].backward()
    torch.testing.assert_close(grads[0], layer_d.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("embedding", "count"), [("float", 4), ("ternary", 5)])
def test_each_weight_is_rounded_once_a_step(tmp_path, monkeypatch, embedding, count):
    ternary = TernaryConfig(group_size=32, embedding=embedding)
    d, calls, forward = make_distiller(tmp_path, ternary=ternary), [], FakeQuantize.forward
    monkeypatch.setattr(FakeQuantize, "forward", lambda self, w: calls.append(self) or forward(self, w))

    def use_once_more(layer, _inputs):
        assert layer.weight.dtype == torch.float32

    for _, layer in quantized_layers(d.student):
        layer.register_forward_pre_hook(use_once_more)
    d.train_step()
    assert len(calls) == len(set(calls)) == count


def test_overfits_one_batch(tmp_path):
    d = make_distiller(tmp_path, steps=30, kl_weight=0.0)
    d.stream = TokenStream(d.stream.tokens[: BATCH * LENGTH + 1], LENGTH, BATCH)
    ce = [d.train_step()["ce"] for _ in range(30)]
    assert ce[-1] < 0.75 * ce[0]


def test_from_scratch(tmp_path):
    a, b = (make_distiller(tmp_path / name, steps=30, init="random", seed=7) for name in "ab")
    for (name, p), q in zip(a.student.named_parameters(), b.student.parameters(), strict=True):
        assert torch.equal(p, q), name
    latents = a.student.backbone.layers[0].mixer.in_proj.parametrizations.weight.original
    assert (latents - a.teacher.backbone.layers[0].mixer.in_proj.weight).norm() > latents.norm()
    kl = [a.train_step()["kl"] for _ in range(30)]
    assert sum(kl[-5:]) < 0.9 * sum(kl[:5])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distilling_brings_the_student_to_the_teacher(tmp_path, dtype):
    d = make_distiller(tmp_path, steps=40, kl_weight=1.0, dtype=dtype)
    before = {name: p.clone() for name, p in d.teacher.named_parameters()}
    d.train()
    kl = [r["kl"] for r in runs.read_metrics(tmp_path)]
    assert sum(kl[-5:]) < 0.6 * sum(kl[:5])
    assert all(torch.equal(p, before[name]) for name, p in d.teacher.named_parameters())
    assert all(p.dtype == torch.float32 for p in d.student.parameters())
    assert d.teacher.dtype == getattr(torch, dtype)


def test_metrics_plot_and_evaluation(tmp_path, monkeypatch):
    d = make_distiller(
        tmp_path, steps=5, eval_every=2, log_every=2, monitor_every=3, eval_tokens=np.arange(100)
    )
    d.train()
    records = runs.read_metrics(tmp_path)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 4, 5]
    assert [r["step"] for r in records if "zero_ratio" in r] == [1, 3, 5]
    evals = [r for r in records if "eval_nats" in r]
    assert [r["step"] for r in evals] == [2, 4, 5]
    assert evals[-1]["eval_nats"] == nats_per_token(d.student, np.arange(100), LENGTH, BATCH)
    last = records[-2]
    assert last["tokens"] == 5 * BATCH * LENGTH
    assert last["loss"] == pytest.approx((last["kl"] + last["ce"]) / 2, rel=1e-5)
    ratios = last["zero_ratio"]
    assert list(ratios) == [f"backbone.layers.{i}.mixer.{p}_proj" for i in (0, 1) for p in ("in", "out")]
    assert last["zero_ratio_min"] == min(ratios.values()) > 0.2
    assert last["zero_ratio_max"] == max(ratios.values()) < 0.3  # uniform weights: 1/4
    assert last["tokens_per_second"] > 0
    pytest.importorskip("matplotlib")
    runs.plot_metrics(tmp_path, 0.5)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"pip install 'ternary-ssm\[train\]'"):
        runs.plot_metrics(tmp_path, 0.5)


def test_zero_ratio_alarm(tmp_path):
    # Of uniform weights with a share z of zeros, absmean makes z + (1 - z)^2 / 4 zero: 49, 53 and 64 %.
    message = r"step 1: .* backbone\.layers\.1\.mixer\.out_proj are zero"
    expectations = {
        0.4: nullcontext(),
        0.45: pytest.warns(UserWarning, match=message),
        0.6: pytest.raises(DistillError, match=message),
    }
    for share, expectation in expectations.items():
        d = make_distiller(tmp_path / str(share), steps=2, learning_rate=1e-9)
        weight = d.student.backbone.layers[1].mixer.out_proj.parametrizations.weight.original
        weight.data.view(-1)[torch.arange(weight.numel()) % 20 < round(20 * share)] = 0
        with warnings.catch_warnings(), expectation:
            if share == 0.4:
                warnings.simplefilter("error")
            d.train()


@pytest.mark.parametrize("rule", ["twn", "mse", "learned", "bounded"])
def test_zero_ratio_alarm_of_other_rules(tmp_path, rule):
    """Each layer's ratio is of the codes that training sees; what a rule is expected to give is no alarm."""
    d = make_distiller(tmp_path, steps=1, learning_rate=1e-9, ternary=TernaryConfig(32, rule))
    layer = d.student.backbone.layers[1].mixer.out_proj
    with torch.no_grad():
        if rule == "learned":  # six times absmean
            layer.parametrizations.weight[0].scale.mul_(6)
        else:
            weight = layer.parametrizations.weight.original
            weight.view(-1)[torch.arange(weight.numel()) % 10 < 9] = 0
    expected = (layer.weight == 0).float().mean().item()
    assert expected > 0.8
    d.train_step()
    assert d.rounding.ratios()["backbone.layers.1.mixer.out_proj"] == pytest.approx(expected)
    d.step = 0
    with pytest.raises(DistillError, match=r"of the codes of .*layers\.1\.mixer\.out_proj are zero"):
        d.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_distiller(tmp_path / "healthy", steps=1, ternary=d.config.ternary).train()


@pytest.mark.parametrize(("rule", "name"), [("learned", "scale"), ("bounded", "logit")])
def test_trained_scales_train_without_decay_and_resume(tmp_path, rule, name):
    options = {"ternary": TernaryConfig(32, rule), "steps": 4, "weight_decay": 0.1}
    whole = make_distiller(tmp_path / "whole", **options)
    before = copy.deepcopy(whole.student.state_dict())
    keys = [k for k in before if k.endswith(f".parametrizations.weight.0.{name}")]
    assert len(keys) == 4
    parameters = dict(whole.student.named_parameters())
    decayed, plain = ({id(p) for p in group["params"]} for group in whole.optimizer.param_groups)
    assert all(id(parameters[k]) in plain for k in keys)
    assert all(id(parameters[k.replace(f"0.{name}", "original")]) in decayed for k in keys)
    whole.train()
    assert all((whole.student.state_dict()[k] != before[k]).all() for k in keys)

    broken = make_distiller(tmp_path / "broken", **options)
    for _ in range(2):
        broken.train_step()
    broken.save()
    resumed = make_distiller(tmp_path / "broken", **options)
    resumed.train(resume=True)
    for key, value in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[key], value), key
    with pytest.raises(DistillError, match="of another run: ternary was"):
        make_distiller(tmp_path / "broken", **options | {"ternary": TERNARY}).train(resume=True)


def test_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    d = make_distiller(tmp_path)
    d.train_step()
    d.student.backbone.norm_f.weight.data[3] = math.nan
    before = d.student.backbone.embeddings.weight.clone()
    with pytest.raises(DistillError, match=r"step 2: loss nan .*windows \[") as error:
        d.train_step()
    assert str(d.stream.windows(1)) in str(error.value)
    assert torch.equal(before, d.student.backbone.embeddings.weight)


def test_refuses_unfit_parts(tmp_path):
    d = make_distiller(tmp_path)
    with pytest.raises(ValueError, match="ternary already"):
        Distiller(d.student, d.stream, d.config, tmp_path)
    with pytest.raises(ValueError, match="the stream's"):
        Distiller(make_teacher(), TokenStream(d.stream.tokens, 8, BATCH), d.config, tmp_path)


# --- the command's function ---------------------------------------------------------------------------------


def test_distill_from_files_to_files(tmp_path, monkeypatch):
    teacher, saved = make_teacher(), []
    monkeypatch.setattr(MambaLM, "from_pretrained", lambda *a, **k: copy.deepcopy(teacher))
    monkeypatch.setattr(MambaLM, "save_pretrained", lambda self, out: saved.append((self, out)))
    np.save(tmp_path / "data.npy", np.arange(400) % VOCAB)
    np.save(tmp_path / "held.npy", np.arange(50) % VOCAB)
    out = tmp_path / "a" / "out"
    config = DistillConfig(TERNARY, 3 * BATCH * LENGTH, LENGTH, BATCH)
    files = tmp_path / "data.npy", out, config, tmp_path / "held.npy"
    student = distill(tmp_path, *files)
    assert saved == [(student, out)]
    assert student.ternary == TERNARY
    assert student.dtype == torch.float16
    packed = [m for m in student.modules() if isinstance(m, TernaryLinear)]
    assert len(packed) == 4
    assert student(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()
    assert {p.name for p in out.iterdir()} >= {"metrics.jsonl", "checkpoints"}
    again = distill(tmp_path, *files, resume=True)  # done already: gives the same model once more
    assert all(torch.equal(w, student.state_dict()[name]) for name, w in again.state_dict().items())
    np.save(tmp_path / "data.npy", np.full(400, VOCAB))
    with pytest.raises(DataError, match="token 0 is 128, expected 0 to 127"):
        distill(tmp_path, *files)
