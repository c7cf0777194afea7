"""The teacher's top-k logits on disk: their loss against the full one, and what is written once."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ternary_ssm import runs
from ternary_ssm.data import DataError
from ternary_ssm.loss import distillation_loss
from ternary_ssm.teacher_cache import TeacherCache, top_k, top_k_loss
from test_distill import BATCH, LENGTH, VOCAB, logged, make_distiller, one_thread  # noqa: F401

V, D = 33, 16


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden, hidden_t, head, head_t = (
        torch.randn(shape, generator=g, dtype=dtype) for shape in ((3, 7, D), (3, 7, D), (V, D), (V, D))
    )
    return (
        hidden.requires_grad_(),
        hidden_t,
        head.requires_grad_(),
        head_t,
        torch.randint(V, (3, 7), generator=g),
    )


def classes(log_p, ids):
    """log p over all [..., v] -> over the k classes and the rest [..., k + 1]."""
    rest = 1 - log_p.gather(-1, ids).exp().sum(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), rest.log()], -1)


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize(("kl_weight", "temperature"), [(0.5, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_loss_and_gradients_are_those_of_k_classes_and_the_rest(k, kl_weight, temperature, chunk):
    hidden, hidden_t, head, head_t, labels = inputs()
    log_t = (F.linear(hidden_t, head_t) / temperature).log_softmax(-1)
    ids = log_t.topk(k).indices
    log_p = classes(log_t, ids)
    found = top_k_loss(hidden, head, log_p, ids, labels, kl_weight, temperature, chunk)
    grads = torch.autograd.grad(found[0], (hidden, head))

    logits = F.linear(hidden, head)
    log_s = classes((logits / temperature).log_softmax(-1), ids)
    kl = F.kl_div(log_s.flatten(0, 1), log_p.flatten(0, 1), reduction="batchmean", log_target=True)
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = kl_weight * temperature**2 * kl + (1 - kl_weight) * ce
    torch.testing.assert_close(found, (loss, kl, ce))
    for ours, true in zip(grads, torch.autograd.grad(loss, (hidden, head)), strict=True):
        torch.testing.assert_close(ours, true)

    full = distillation_loss(hidden, hidden_t, head, head_t, labels, kl_weight, temperature)
    torch.testing.assert_close(found[2], full[2])
    if k == V - 1:  # the rest is one class as well
        torch.testing.assert_close(found[:2], full[:2])
        assert all(g is not None for g in grads)
    else:
        assert found[1] < full[1]


def test_stored_values():
    logits = torch.tensor([[3.0, 1, 2, 0], [200, 0, 0, 0]])
    log_p, ids, rest = top_k(logits, 2, 2.0)
    expected = (logits / 2).log_softmax(-1)
    assert ids[0].tolist() == [0, 2] and log_p.dtype == torch.float16
    torch.testing.assert_close(log_p[0].float(), expected[0, [0, 2]], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rest[0], expected[0, [1, 3]].logsumexp(0))
    everything = torch.cat([log_p.float(), rest[:, None]], -1).exp().sum(-1)
    torch.testing.assert_close(everything, torch.ones(2), rtol=1e-3, atol=1e-3)
    assert top_k(torch.tensor([[1e6, 0, 0]]), 1, 1.0)[2].isfinite().all()


def cache(path, **changes):
    identity = {"teacher": "a", "vocabulary": V} | changes
    return TeacherCache(path, identity, windows=10, length=3, k=4)


def test_fills_once_and_goes_on_where_it_was_stopped(tmp_path):
    head = torch.randn(V, D)
    calls = []

    def teacher(windows):
        calls.append(windows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.stack([torch.full((3, D), float(w)) for w in windows])

    first = cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.fill([7, 1, 3, 5, 9, 1], 2, teacher, head, 1.0)
    assert calls == [[1, 3], [5, 7], [9]]
    assert not first.done.any()  # what was not yet on the disk is done again
    first.fill([7, 1, 3], 2, teacher, head, 1.0)
    again = cache(tmp_path)
    calls[:] = [None] * 3
    again.fill([0, 1, 3, 7], 1, teacher, head, 1.0)
    assert calls[3:] == [[0]]
    assert again.done.tolist() == [1, 1, 0, 1, 0, 0, 0, 1, 0, 0]
    log_p, ids = again.read([7, 0], torch.device("cpu"))
    expected = F.linear(torch.full((D,), 7.0), head).log_softmax(-1)
    assert ids[0, 2].tolist() == expected.topk(4).indices.tolist()
    torch.testing.assert_close(log_p[0, 1, :4], expected.topk(4).values, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 3))


def test_refuses_another_teacher_and_a_torn_beginning(tmp_path):
    cache(tmp_path).done[:] = 1
    with pytest.raises(DataError, match="cache of something else: teacher was a, is b"):
        cache(tmp_path, teacher="b")
    assert cache(tmp_path).done.all()
    (tmp_path / "cache.json").unlink()  # a kill before it was whole
    assert not cache(tmp_path).done.any()
    assert json.loads((tmp_path / "cache.json").read_text())["k"] == 4
    with pytest.raises(ValueError, match="teacher_top_k is 33, expected 1 to 32"):
        TeacherCache(tmp_path, {"vocabulary": V}, 1, 1, V)


def test_a_run_of_all_logits_but_one_is_the_run_without_a_cache(tmp_path):
    options = {"steps": 4, "temperature": 2.0}
    make_distiller(tmp_path / "plain", **options).train()
    d = make_distiller(tmp_path / "cached", teacher_top_k=VOCAB - 1, **options)
    d.train()
    assert d.teacher is None
    cost, *found = logged(tmp_path / "cached")
    for ours, true in zip(found, logged(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(true["loss"], rel=1e-3)
    assert cost["kl_top_k"] == pytest.approx(cost["kl_full"], rel=1e-3)
    assert cost["kl_full"] == pytest.approx(found[0]["kl"], rel=1e-3)
    assert cost["step"] == 0


def test_a_second_run_does_not_ask_the_teacher_and_the_cost_is_logged(tmp_path, monkeypatch):
    options = {"steps": 4, "teacher_top_k": 4}
    d = make_distiller(tmp_path, **options)
    for _ in range(2):
        d.train_step()  # before the cache: the teacher itself
    d.save()
    d = make_distiller(tmp_path, **options)
    d.train(resume=True)
    cost = runs.read_metrics(tmp_path)[0]
    assert cost["step"] == 2 and 0 < cost["kl_top_k"] < cost["kl_full"] and 0.1 < cost["teacher_rest"] < 1
    size = sum(f.stat().st_size for f in (tmp_path / "teacher_cache").glob("*.npy"))
    assert size < 31 * LENGTH * (4 * (2 + 2) + 4) + 31 + 4 * 1024  # 500 tokens: 31 windows

    asked = []
    e = make_distiller(tmp_path / "second", teacher_cache=tmp_path / "teacher_cache", **options)
    teach = e._teach
    monkeypatch.setattr(e, "_teach", lambda windows: asked.append(len(windows)) or teach(windows))
    e.train()
    assert sum(asked) == 2 * BATCH + BATCH  # steps 1 and 2, and once to tell the cost
    assert np.isfinite([r["loss"] for r in runs.read_metrics(tmp_path / "second")[1:]]).all()
