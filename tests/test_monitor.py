"""What is watched in a run, and what is done to weights on their way into a step."""

import copy
import dataclasses
import json
import math
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from ternary_ssm import MambaLM, TernaryConfig, runs
from ternary_ssm import distill as training
from ternary_ssm.distill import DistillConfig, DistillError, distill
from ternary_ssm.monitor import first_not_finite
from ternary_ssm.quantizer import FakeQuantize
from ternary_ssm.surgery import quantized_layers
from test_distill import (  # noqa: F401
    BATCH,
    LENGTH,
    TERNARY,
    VOCAB,
    logged,
    make_distiller,
    make_teacher,
    one_thread,
)

LEARNED = TernaryConfig(32, "learned")


def latent_of(layer) -> torch.Tensor:
    return layer.parametrizations.weight.original


# --- zero ratios --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"recompute": 1.0, "micro_batch_size": 2}])
def test_zeros_are_counted_in_the_weights_of_the_step(tmp_path, options):
    d = make_distiller(tmp_path, steps=8, monitor_every=3, **options)
    for step in range(1, 9):
        expected = {
            name: (layer.weight == 0).float().mean().item() for name, layer in quantized_layers(d.student)
        }
        d.train_step()
        assert d.rounding.ratios() == (pytest.approx(expected) if step in (1, 3, 6, 8) else {})


@pytest.mark.parametrize(("rule", "name"), [("learned", "scale"), ("bounded", "logit")])
def test_a_collapsed_layer_gets_its_first_scales_back_and_the_run_goes_on(tmp_path, rule, name):
    d = make_distiller(
        tmp_path, steps=3, ternary=TernaryConfig(32, rule), on_collapse="reset", learning_rate=1e-9
    )
    d.train_step()
    layer = d.student.backbone.layers[1].mixer.out_proj
    trained = getattr(layer.parametrizations.weight[0], name)
    if rule == "learned":
        trained.data.mul_(6)
    else:  # bounded by twice absmean: a collapse needs many small weights beside a few large ones
        trained.data.fill_(3)
        latent_of(layer).data.view(-1)[torch.arange(latent_of(layer).numel()) % 10 < 9] *= 0.01
    assert d.optimizer.state[trained]["exp_avg"].any()
    d.optimizer.state[trained]["exp_avg_sq"].fill_(9)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        d.train_step()
        d._watch(d.rounding.ratios())
    (text,) = [str(w.message) for w in found]
    assert "of the codes of backbone.layers.1.mixer.out_proj are zero" in text and "absmean again" in text
    fresh = FakeQuantize(d.config.ternary, latent_of(layer))
    assert torch.equal(trained, getattr(fresh, name))
    assert not any(d.optimizer.state[trained][key].any() for key in ("exp_avg", "exp_avg_sq"))
    d.train_step()
    other = getattr(d.student.backbone.layers[0].mixer.out_proj.parametrizations.weight[0], name)
    assert d.optimizer.state[other]["exp_avg"].any()


def test_only_trained_scales_can_be_reset():
    with pytest.raises(ValueError, match="rule 'absmean' has no trained scales to set back"):
        DistillConfig(TERNARY, 100, on_collapse="reset")


# --- what is not finite -------------------------------------------------------------------------------------


def fail(d, match: str) -> dict:
    """The dump of the step that fails."""
    with pytest.raises(DistillError, match=match) as error:
        d.train_step()
    path = d.out / "dumps" / f"step-{d.step + 1:09d}.json"
    assert f"replay the step from {path}" in str(error.value)
    return json.loads(path.read_text())


def test_the_first_parameter_activation_or_gradient_is_named_and_replayed(tmp_path):
    d = make_distiller(tmp_path / "p")
    d.student.backbone.layers[1].mixer.conv1d.bias.data[2] = math.inf
    dump = fail(d, "first tensor that is not finite: parameter backbone.layers.1.mixer.conv1d.bias")
    assert dump["windows"] == d.stream.windows(0) and dump["step"] == 1
    with pytest.raises(DistillError, match=r"parameter backbone\.layers\.1\.mixer\.conv1d\.bias"):
        make_distiller(tmp_path / "p").replay(tmp_path / "p" / "dumps" / "step-000000001.json")

    d = make_distiller(tmp_path / "a", micro_batch_size=2)
    d.train_step()
    d.student.backbone.layers[0].norm.weight.data.fill_(3e38)  # overflows in in_proj, or behind it
    fail(d, r"step 2: .* is not finite: output of backbone\.layers\.0\.(norm|mixer\.in_proj);")
    with pytest.raises(DistillError, match=r"step 2: .* output of backbone\.layers\.0\."):
        make_distiller(tmp_path / "a", micro_batch_size=4).replay(tmp_path / "a/dumps/step-000000002.json")

    d = make_distiller(tmp_path / "g")
    weight = d.student.backbone.norm_f.weight
    handle = weight.register_hook(lambda grad: grad * math.inf)
    fail(d, "loss [0-9].*first tensor that is not finite: gradient of backbone.norm_f.weight")
    handle.remove()
    again = make_distiller(tmp_path / "g")
    record = again.replay(tmp_path / "g" / "dumps" / "step-000000001.json")  # finite without the hook
    assert record == make_distiller(tmp_path / "h").train_step()


def test_nothing_is_named_where_all_is_finite(tmp_path):
    d = make_distiller(tmp_path)
    assert (
        first_not_finite(d._replica, d.student, [lambda model: model(torch.zeros(1, 3, dtype=int))]) is None
    )


def test_replay_refuses_another_run(tmp_path):
    d = make_distiller(tmp_path)
    d.student.backbone.norm_f.weight.data[0] = math.nan
    fail(d, "parameter")
    with pytest.raises(DistillError, match=r"step-000000001\.json is of another run: learning_rate was"):
        make_distiller(tmp_path, learning_rate=1e-3).replay(tmp_path / "dumps" / "step-000000001.json")


def test_replay_from_files(tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    np.save(tmp_path / "data.npy", np.arange(400) % VOCAB)
    config = DistillConfig(TERNARY, 3 * BATCH * LENGTH, LENGTH, BATCH)
    files = tmp_path / "teacher", tmp_path / "data.npy", tmp_path / "out", config
    d = training._distiller(*files, None, None)
    weight = d.student.backbone.norm_f.weight
    handle = weight.register_hook(lambda grad: grad * math.nan)
    fail(d, "gradient of backbone.norm_f.weight")
    handle.remove()
    record = training.replay(*files, tmp_path / "out" / "dumps" / "step-000000001.json")
    assert record["step"] == 1 and math.isfinite(record["loss"])
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


# --- TensorBoard --------------------------------------------------------------------------------------------


def test_tensorboard_gets_what_the_log_gets(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"steps": 4, "tensorboard": True, "eval_tokens": np.arange(40), "eval_every": 4}
    make_distiller(tmp_path, **options).train()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0})
    events.Reload()
    records = runs.read_metrics(tmp_path)
    for name in ("loss", "kl", "ce", "lr", "grad_norm", "tokens_per_second", "zero_ratio_mean"):
        found = [(e.step, e.value) for e in events.Scalars(name)]
        assert found == [(r["step"], pytest.approx(r[name])) for r in records if name in r], name
    assert len(events.Scalars("zero_ratio/backbone.layers.0.mixer.in_proj")) == 4
    assert [e.step for e in events.Histograms("zero_ratio")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("eval_nats")] == [4]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match=r"tensorboard needs its package: pip install 'ternary-ssm\[train\]'"
    ):
        make_distiller(tmp_path / "without", **options).train()


# --- rows that stay dense, annealing, hidden states, documents ----------------------------------------------


@pytest.mark.parametrize(
    ("layer", "rows", "dense"),
    [
        ("Mamba2", ("z", "x", "B", "C"), [slice(288, 292)]),
        ("Mamba2", ("dt", "z", "B"), [slice(128, 256), slice(272, 288)]),
        ("Mamba1", ("z",), [slice(0, 128)]),
    ],
)
def test_some_rows_of_in_proj_stay_dense(tmp_path, layer, rows, dense):
    """d_model 64: in Mamba-2 z and x have 128 rows, B and C 16, dt 4; in Mamba-1 x and z have 128."""
    d = make_distiller(tmp_path, layer=layer, ternary_rows=rows, steps=1, learning_rate=1e-9)
    whole = make_distiller(tmp_path / "whole", layer=layer)
    in_proj = d.student.backbone.layers[0].mixer.in_proj
    expected = whole.student.backbone.layers[0].mixer.in_proj.weight.detach().clone()
    ternary = torch.ones(len(expected), dtype=torch.bool)
    for part in dense:
        expected[part], ternary[part] = latent_of(in_proj)[part], False
    assert torch.equal(in_proj.weight, expected)
    d.train_step()
    zeros = (expected[ternary] == 0).float().mean().item()
    assert d.rounding.ratios()["backbone.layers.0.mixer.in_proj"] == pytest.approx(zeros)
    (in_proj.weight * 2).sum().backward()
    assert (latent_of(in_proj).grad == 2).all()
    trained = in_proj.weight.detach().half()
    model = d.packed()
    assert model.ternary is None and not list(quantized_layers(model))
    assert torch.equal(model.backbone.layers[0].mixer.in_proj.weight, trained)


def test_a_student_of_shifted_signs_is_saved_as_a_dense_model(tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    np.save(tmp_path / "data.npy", np.arange(400) % VOCAB)
    ternary = dataclasses.replace(TERNARY, rule="shifted")
    config = DistillConfig(ternary, 20 * BATCH * LENGTH, LENGTH, BATCH, learning_rate=3e-3, log_every=1)
    student = distill(tmp_path / "teacher", tmp_path / "data.npy", tmp_path / "out", config)
    losses = [r["loss"] for r in runs.read_metrics(tmp_path / "out")]
    assert losses[-1] < 0.9 * losses[0]
    loaded = MambaLM.from_pretrained(tmp_path / "out")
    assert loaded.ternary is None
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))
    weight = student.backbone.layers[0].mixer.in_proj.weight
    assert all(len(column.unique()) == 2 for column in weight.T)


def test_a_student_with_dense_rows_is_saved_as_a_dense_model(tmp_path, monkeypatch):
    make_teacher().save_pretrained(tmp_path / "teacher")
    np.save(tmp_path / "data.npy", np.arange(400) % VOCAB)
    config = DistillConfig(TERNARY, 2 * BATCH * LENGTH, LENGTH, BATCH, ternary_rows=("z", "x"))
    student = distill(tmp_path / "teacher", tmp_path / "data.npy", tmp_path / "out", config)
    loaded = MambaLM.from_pretrained(tmp_path / "out")
    assert loaded.ternary is None
    ids = torch.arange(9)[None]
    assert torch.equal(loaded.float()(ids).logits, student.float()(ids).logits)
    x, dt = (
        loaded.backbone.layers[0].mixer.in_proj.weight[rows] for rows in (slice(0, 256), slice(256, None))
    )
    assert all(len(group.abs().unique()) <= 2 for group in x.view(-1, 32))
    assert any(len(group.abs().unique()) > 2 for group in dt.reshape(-1, 32))


def test_weights_are_annealed_from_latent_to_rounded(tmp_path):
    d = make_distiller(tmp_path, steps=10, anneal_ratio=0.4, learning_rate=1e-9)
    layer = d.student.backbone.layers[0].mixer.in_proj
    rounded, latent = layer.weight.detach(), latent_of(layer).detach()
    for share in (0.25, 0.5, 0.75, 1.0, 1.0):
        d.train_step()
        assert d.rounding.share == share
        torch.testing.assert_close(layer.weight, latent + share * (rounded - latent), atol=1e-6, rtol=0)
        assert min(d.rounding.ratios().values()) > 0.2  # of the rounded weights
    d.rounding.share = 0.3
    (layer.weight * 2).sum().backward()
    torch.testing.assert_close(latent_of(layer).grad, torch.full_like(latent, 2))
    assert d.packed().ternary == TERNARY
    assert [DistillConfig(TERNARY, 64, 16, 4).rounded_share_at(step) for step in (0, 1)] == [1, 1]


def test_hidden_states_are_drawn_to_the_teachers(tmp_path):
    d = make_distiller(tmp_path, steps=30, kl_weight=0.0, hidden_weight=100.0)
    records = [d.train_step() for _ in range(30)]
    ids = d.stream.batch(0)[:, :-1]
    fresh = make_distiller(tmp_path / "fresh")
    pair = fresh.student.backbone(ids).detach(), fresh.teacher.backbone(ids)
    expected = 1 - torch.nn.functional.cosine_similarity(*pair, dim=-1).mean()
    assert records[0]["hidden"] == pytest.approx(expected.item(), rel=1e-4)
    assert records[0]["loss"] == pytest.approx(records[0]["ce"] + 100 * records[0]["hidden"], rel=1e-4)
    assert records[-1]["hidden"] < 0.5 * records[0]["hidden"]
    with pytest.raises(ValueError, match="hidden_weight needs the teacher's hidden states"):
        make_distiller(tmp_path / "x", hidden_weight=1.0, teacher_top_k=3)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_states_begin_anew_with_each_document(tmp_path, layer):
    """The losses are the means over documents that are run alone, and so are the gradients."""
    ends = (7, 11)
    d = make_distiller(tmp_path, layer=layer, reset_at_documents=True, document_ends=ends, grad_clip=1e9)
    plain = make_distiller(tmp_path / "plain", layer=layer)
    windows = d.stream.windows(0)
    ids = d.stream.rows(windows)
    assert torch.isin(ids[:, :-2], torch.tensor(ends)).any()
    total, count = torch.zeros(3), 0
    for row in ids:
        starts = [0, *(i + 1 for i, token in enumerate(row[:-2].tolist()) if token in ends), len(row) - 1]
        for begin, end in pairwise(starts):
            plain.stream.rows = lambda _, piece=row[begin : end + 1]: piece[None]
            plain.stream.sequence_length = end - begin
            losses = plain._losses(plain.student, [0])
            (losses[0] * (end - begin) / ids[:, 1:].numel()).backward()
            total, count = total + torch.stack(losses[:3]).detach() * (end - begin), count + end - begin
    assert count == ids[:, 1:].numel()
    losses = d._losses(d.student, windows)
    torch.testing.assert_close(torch.stack(losses[:3]), total / count, rtol=1e-5, atol=1e-5)
    losses[0].backward()
    pairs = zip(d.student.named_parameters(), plain.student.parameters(), strict=True)
    for (name, ours), other in pairs:
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="reset_at_documents needs the token that ends documents"):
        make_distiller(tmp_path / "x", reset_at_documents=True)


def test_bf16_runs_with_every_option(tmp_path):
    options = {"hidden_weight": 0.1, "anneal_ratio": 0.5, "recompute": 1.0, "steps": 3}
    options |= {"reset_at_documents": True, "document_ends": (3,), "micro_batch_size": 2, "ternary": LEARNED}
    d = make_distiller(tmp_path, dtype="bfloat16", ternary_rows=("z", "x", "dt"), **options)
    d.train()
    assert all(math.isfinite(r["loss"]) for r in logged(tmp_path))
    assert all(p.dtype == torch.float32 for p in d.student.parameters())


def test_resuming_with_all_options_is_the_unbroken_run(tmp_path):
    options = {"hidden_weight": 0.1, "anneal_ratio": 0.5, "reset_at_documents": True, "document_ends": (3,)}
    options |= {"steps": 4, "recompute": 1.0, "ternary": LEARNED}
    whole = make_distiller(tmp_path / "whole", **options)
    whole.train()
    d = make_distiller(tmp_path / "broken", **options)
    for _ in range(2):
        d.train_step()
    d.save()
    resumed = make_distiller(tmp_path / "broken", **copy.deepcopy(options))
    resumed.train(resume=True)
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")[2:]
    for name, weight in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], weight), name
