"""HarnessLM: what lm-evaluation-harness gets from a model."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from ternary_ssm import MambaConfig, MambaLM, cli

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from ternary_ssm.harness import HarnessLM  # noqa: E402

WORDS = ["<|endoftext|>", *"the a cat dog sat ran on under mat tree . yes no".split()]
PAIRS = [("the cat", " sat on the mat ."), ("", "a dog ran"), ("a dog", " sat"), ("the", " no yes no yes")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.fixture(scope="module")
def model() -> MambaLM:
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=64,
        n_layer=2,
        vocab_size=len(WORDS),
        ssm_cfg={"layer": "Mamba2", "headdim": 16, "d_state": 16},
    )
    return MambaLM(config).eval()


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


@torch.no_grad()
def expected(model: MambaLM, ids: list[int], scored: int) -> tuple[float, bool]:
    """log p of the last `scored` ids, and whether they are the likeliest."""
    log_p = model(torch.tensor([ids[:-1]])).logits[0, :, : len(WORDS)].log_softmax(-1)[-scored:]
    labels = torch.tensor(ids[-scored:])
    return log_p.gather(1, labels[:, None]).sum().item(), bool((log_p.argmax(-1) == labels).all())


@pytest.mark.parametrize("batch_tokens", [1, 7, 1000])
def test_loglikelihood(model, tokenizer, batch_tokens):
    lm = HarnessLM(model, tokenizer, batch_tokens)
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, after), (log_p, greedy) in zip(PAIRS, found, strict=True):
        ids = lm.tok_encode(context) or [0]
        wanted = expected(model, ids + lm.tok_encode(after), len(lm.tok_encode(after)))
        assert (log_p, greedy) == (pytest.approx(wanted[0], rel=1e-4), wanted[1])


def test_greedy_continuations_are_told(model, tokenizer):
    lm = HarnessLM(model, tokenizer)
    prompt = lm.tok_encode("the cat")
    ids = model.generate([prompt], 3, eos_token_id=())[0][2:]
    likely, unlikely = (("", ""), prompt, ids), (("", ""), prompt, [*ids[:2], (ids[2] + 1) % len(WORDS)])
    assert [greedy for _, greedy in lm._loglikelihood_tokens([likely, unlikely])] == [True, False]


def test_long_contexts_lose_their_beginning(model, tokenizer):
    lm = HarnessLM(model, tokenizer, max_length=5)
    context, after = [1, 2, 3, 4, 5, 6, 7, 8], [9, 10]
    (log_p, _), (too_long, _) = lm._loglikelihood_tokens(
        [(("", ""), context, after), (("", ""), [], [*context, *after])]
    )
    assert log_p == pytest.approx(expected(model, [5, 6, 7, 8, 9, 10], 2)[0], rel=1e-4)
    assert too_long == pytest.approx(expected(model, [5, 6, 7, 8, 9, 10], 5)[0], rel=1e-4)


@pytest.mark.parametrize("max_length", [3, 100])
def test_rolling(model, tokenizer, max_length):
    lm = HarnessLM(model, tokenizer, max_length=max_length)
    text = "the cat sat on the mat . a dog ran under the tree ."
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    ids, total = [0, *lm.tok_encode(text)], 0.0
    for begin in range(0, len(ids) - 1, max_length):
        window = ids[begin : begin + max_length + 1]
        if begin + max_length + 1 > len(ids):  # the last window is filled up with what is before it
            window, scored = ids[-max_length - 1 :], len(ids) - 1 - begin
        else:
            scored = max_length
        total += expected(model, window, scored)[0]
    assert found == pytest.approx(total, rel=1e-4)


def test_generate_until(model, tokenizer):
    lm = HarnessLM(model, tokenizer)
    prompt = lm.tok_encode("the cat")
    new = model.generate([prompt], 6, eos_token_id=0)[0][2:]
    new = new[: new.index(0)] if 0 in new else new
    text = tokenizer.decode(new)
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    stop = text.split()[1] if len(text.split()) > 1 else "never"
    calls = [("the cat", options), ("the cat", options | {"until": [stop]})]
    found = lm.generate_until(requests("generate_until", calls), disable_tqdm=True)
    assert found == [text, text[: text.index(stop)] if stop in text else text]


def test_a_task_from_end_to_end(model, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"text": "the cat", "choices": [" sat .", " ran ."], "label": i % 2} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = f"""
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "d.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""
    (tmp_path / "tiny_choice.yaml").write_text(task)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    evaluate = lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **k: evaluate(**k, task_manager=manager))
    command = ["evaluate", str(tmp_path / "model"), "--tasks", "tiny_choice", "--device", "cpu"]
    assert cli.main([*command, "--out", str(tmp_path / "out.json")]) == 0
    assert "tiny_choice" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["results"]["tiny_choice"]["acc,none"] == 0.5


@pytest.mark.parametrize("options", [{"batch_tokens": 0}, {"max_length": 0}])
def test_refusals(model, tokenizer, options):
    with pytest.raises(ValueError, match="expected at least 1"):
        HarnessLM(model, tokenizer, **options)


def test_a_tokenizer_without_an_end(model):
    with pytest.raises(ValueError, match=r"no eos_token_id and the tokenizer no <\|endoftext\|>"):
        HarnessLM(model, Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
