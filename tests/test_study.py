"""The study of the tiny English model: what it runs, how it scores, what it keeps, and the table of it."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ternary_ssm import TernaryConfig, quantize_
from test_distill import VOCAB, make_teacher, one_thread  # noqa: F401

ROOT = Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch):
    for folder in ("recipes/tiny-english", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import study

    return study


@pytest.fixture
def args(tmp_path):
    """Files of a teacher of 128 words."""
    teacher = tmp_path / "teacher"
    make_teacher().save_pretrained(teacher)
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(teacher / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 97 + 1}" for i in range(300)))
    passages = ({"context": "w5 " * n + "w2", "continuation": "w3 w4"} for n in (9, 1, 4))
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages))
    text = tmp_path / "text.txt"
    found = argparse.Namespace(data=text, held_out=text, lambada=tmp_path / "lambada.jsonl", teacher=teacher)
    found.tokens, found.seeds, found.sequence_length, found.batch_size = [64, 128], 2, 16, 2
    found.device, found.out = "cpu", tmp_path / "study.json"
    return found


def test_the_last_words_are_scored_as_one_by_one(study, args):
    model, items = make_teacher(), study.Study(args).words
    assert [(len(ids), n) for ids, n in items] == [(4, 2), (7, 2), (12, 2)]
    nats, right = 0.0, 0
    for ids, n in items:
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        after = [(log_p[i - 1], ids[i]) for i in range(len(ids) - n, len(ids))]
        nats -= sum(row[token].item() for row, token in after)
        right += all(row.argmax() == token for row, token in after)
    for batch in (1, 2, 64):
        perplexity, accuracy = study.last_words(model, items, batch)
        assert perplexity == pytest.approx(math.exp(nats / 3), rel=1e-4) and accuracy == right / 3


def test_the_gradients_of_scales_are_noted(study):
    student = quantize_(make_teacher(), TernaryConfig(32, "learned"))
    scales = study.Scales(student)
    grads = {name: torch.zeros_like(scale) for name, scale in scales._scales.items()}
    for seed in range(2):
        student.zero_grad()
        student(torch.tensor([[seed, 3, 5]])).logits.square().mean().backward()
        for name, scale in scales._scales.items():
            grads[name] += scale.grad / 2
    with torch.no_grad():
        for scale in scales._scales.values():
            scale *= 3
    record = scales.record()
    assert list(record["scale"].values()) == pytest.approx([3] * 4, rel=1e-5)
    for name, grad in grads.items():
        assert record["scale_gradient"][name] == pytest.approx(grad.mean().item(), rel=1e-4)
        assert 0 < record["scale_rises"][name] < 1


def test_from_runs_to_the_table(study, args, monkeypatch):
    import report

    data, work = study.begin(args), study.Study(args)
    runs = study.runs_of(args.tokens, args.seeds)
    assert len(set(runs)) == len(runs) == 2 + 2 * 2 * 3 + 1
    monkeypatch.setattr(study, "TernaryConfig", lambda **rule: TernaryConfig(32, **rule))
    for run in runs:
        study.add(args.out, data, work.result(run))
    assert study.begin(args) == json.loads(args.out.read_text()) == data
    found = {study.Run(**{k: r[k] for k in study.Run.__dataclass_fields__}) for r in data["records"]}
    assert found == set(runs)
    assert [len(r["curve"]) for r in data["records"] if "curve" in r] == [4, 4]
    losses = [r["nats"] for r in data["records"] if (r["rule"], r["tokens"]) == ("absmean", 128)]
    assert len(set(losses)) == 6  # no two of the losses and seeds are the same run
    args.tokens = [64]
    with pytest.raises(SystemExit, match=r"is of a study with {'tokens': \[64, 128\]"):
        study.begin(args)

    table = report.study(data["records"]).splitlines()
    assert len(table) == 2 + 2 + 2 * 3 + 1 + 4  # head, not trained, trained, learned, links
    mean = sum(r["nats"] for r in data["records"] if (r["tokens"], r["kl_weight"]) == (64, 1.0)) / 2
    row = next(line for line in table if "| KL | 6.4e-05 M | 2 |" in line)
    assert f"| {mean:.3f} ± " in row
    pytest.importorskip("matplotlib")
    report.plot_study(args.out)
    names = {p.name for p in args.out.parent.glob("*.png")}
    assert names == {"study_zero_ratios.png", "study_scales.png"}


def test_a_run_that_diverges_is_in_the_table(study, args, monkeypatch):
    import report

    def fail(_distiller):
        raise study.DistillError("step 1: loss nan")

    monkeypatch.setattr(study, "TernaryConfig", lambda **rule: TernaryConfig(32, **rule))
    monkeypatch.setattr(study.Distiller, "train_step", fail)
    record = study.Study(args).result(study.Run("learned", 0.5, 128))
    assert record["error"] == "step 1: loss nan" and "nats" not in record
    assert "| 1 | step 1 | step 1 | step 1 | step 1 |" in report.study([record])


@pytest.fixture(autouse=True)
def clean_modules():
    yield
    for name in ("study", "report"):
        sys.modules.pop(name, None)
