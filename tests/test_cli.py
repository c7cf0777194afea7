"""The command ternary-ssm, end to end on a tiny model and tokenizer."""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, cli, pack_
from ternary_ssm.flags import add_flags, from_flags
from ternary_ssm.generation import SamplingConfig

TEXT = "the small model reads a small text, and the text is read by the small model – über alles."
RUN = [sys.executable, "-c", "import sys; from ternary_ssm.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=["Mamba1", "Mamba2"])
def directory(request, tokenizer, tmp_path_factory) -> str:
    """A dense model and its tokenizer."""
    torch.manual_seed(1)
    ssm_cfg = {"layer": request.param} | ({"headdim": 16} if request.param == "Mamba2" else {})
    size = {"d_model": 64, "n_layer": 2, "vocab_size": tokenizer.get_vocab_size(), "ssm_cfg": ssm_cfg}
    model = MambaLM(MambaConfig(**size, eos_token_id=0))
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return str(path)


@pytest.fixture(scope="module")
def ternary(directory, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("ternary") / "out")
    assert cli.main(["quantize", directory, out, "--group-size", "32"]) == 0
    return out


def fails(capsys, words: str, *argv: str) -> None:
    """The command fails with one line that says why."""
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"ternary-ssm: error: .*\n", err)
    assert words in err
    assert out == ""


# generate


def expected(directory: str, tokenizer: Tokenizer, prompt: str, n: int, **options) -> str:
    ids = tokenizer.encode(prompt).ids
    (row,) = MambaLM.from_pretrained(directory).generate([ids], n, **options)
    return tokenizer.decode(row[len(ids) :])


def test_generate_streams_one_prompt(ternary, tokenizer, capsys):
    argv = [
        "generate",
        "--model",
        ternary,
        "--device",
        "cpu",
        "--prompt",
        "the small ü",
        "--max-new-tokens",
        "9",
    ]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert out == expected(ternary, tokenizer, "the small ü", 9) + "\n"
    tokens = len(tokenizer.encode("the small ü").ids)
    assert re.fullmatch(rf"{tokens} prompt tokens in \S+ s, 9 new tokens at \S+ tokens/s\n", err)


def test_generate_prints_several_prompts(ternary, tokenizer, capsys):
    sampled = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01", "--seed", "3"]
    argv = ["generate", "--model", ternary, "--device", "cpu", "--prompt", "the", "--prompt", "a text"]
    assert cli.main([*argv, "--max-new-tokens", "6", "--repetition-penalty", "1.1", *sampled]) == 0
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
    texts = [
        expected(ternary, tokenizer, p, 6, seed=3 + i, **options) for i, p in enumerate(("the", "a text"))
    ]
    assert capsys.readouterr().out == f"--- 'the'\n{texts[0]}\n--- 'a text'\n{texts[1]}\n"


@pytest.mark.parametrize("prompts", [["the"], ["the", "the"]])
def test_generate_stops_at_a_text(ternary, tokenizer, capsys, monkeypatch, prompts):
    from ternary_ssm import generation

    text = "a small model reads the text"
    ids = tokenizer.encode(text).ids
    steps = []

    def say(model, prompts, max_new_tokens, config):
        for token in ids:
            steps.append(token)
            yield [token] * len(prompts)

    monkeypatch.setattr(generation, "stream", say)
    flags = [f for p in prompts for f in ("--prompt", p)]
    assert cli.main(["generate", "--model", ternary, *flags, "--stop", "el re", "--stop", "never"]) == 0
    expected = [text[: text.index("el re")] + "\n"] * len(prompts)
    assert re.split(r"--- 'the'\n", capsys.readouterr().out)[-len(prompts) :] == expected
    assert len(steps) < len(ids)


def test_generate_no_tokens(ternary, capsys):
    argv = ["generate", "--model", ternary, "--device", "cpu", "--prompt", "the", "--max-new-tokens", "0"]
    assert cli.main(argv) == 0
    assert capsys.readouterr() == ("\n", "")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "temperature is -1.0, expected 0 or"),
        (["--max-new-tokens", "-1"], "max_new_tokens is -1"),
        (["--stop", ""], "a stop text is empty"),
        (["--device", "tpu"], "tpu"),
        (["--device", "meta"], "--device is meta, expected cpu or cuda"),
        (["--device", "cuda:99"], "--device is cuda:99, torch sees"),
        (["--prompt", ""], "prompt 1 is []"),
    ],
)
def test_generate_refuses(ternary, capsys, flags, words):
    fails(capsys, words, "generate", "--model", ternary, "--prompt", "a", *flags)


def test_generate_without_a_tokenizer(ternary, capsys, tmp_path):
    fails(capsys, "tokenizer.json: no such file", "generate", "--model", str(tmp_path), "--prompt", "a")
    (tmp_path / "tokenizer.json").write_text("{")
    fails(capsys, "tokenizer.json: not a readable", "generate", "--model", str(tmp_path), "--prompt", "a")


# inspect


def table(capsys, *argv: str) -> tuple[dict[str, list[str]], str]:
    assert cli.main(["inspect", *argv]) == 0
    head, rows, totals = re.fullmatch(r"(.*?)\n(.*)\n\n(.*)", capsys.readouterr().out, re.S).groups()
    assert head.split() == ["tensor", "count", "shape", "bits", "bytes", "zeros"]
    return {row.split()[0]: row.split(maxsplit=1)[1] for row in rows.splitlines()}, totals


def test_inspect_dense(directory, capsys):
    rows, totals = table(capsys, directory)
    model = MambaLM.from_pretrained(directory)
    weights = sum(p.numel() for p in model.parameters())
    assert rows["backbone.embeddings.weight"].split() == ["1", "296", "x", "64", "32.000", "75,776"]
    assert "dense" in totals
    assert f"{weights:,} weights, {4 * weights:,} bytes, 32.000 bits a weight" in totals
    assert "0.50 x smaller than FP16" in totals


def test_inspect_ternary(ternary, capsys):
    rows, totals = table(capsys, ternary)
    model = MambaLM.from_pretrained(ternary)
    out_proj = model.backbone.layers[0].mixer.out_proj
    count, shape, bits, size, zeros = re.split(
        r"  +", rows["backbone.layers.*.mixer.out_proj.weight"].strip()
    )
    assert (count, shape) == ("2", "64 x 128")
    assert float(bits) == 2.5  # 2 bits, and an FP16 scale for 32 weights
    assert int(size.replace(",", "")) == 2 * 64 * 128 * 2.5 / 8
    assert 0.2 < float(zeros.split()[0]) < 0.45
    assert "ternary, group size 32" in totals

    rows, totals_of_layers = table(capsys, ternary, "--layers")
    assert totals_of_layers == totals
    assert rows["backbone.layers.0.mixer.out_proj.weight"].endswith(f"{out_proj.ternary.zero_ratio():.3f}")
    nbytes = sum(t.nbytes for t in model.state_dict().values())
    assert f" {nbytes:,} bytes, " in totals


def test_inspect_int8_embedding(directory, capsys, tmp_path):
    out = str(tmp_path / "out")
    flags = ["--group-size", "row", "--embedding", "int8", "--scale-dtype", "float32"]
    assert cli.main(["quantize", directory, out, *flags]) == 0
    rows, _ = table(capsys, out)
    assert rows["backbone.embeddings.weight"].split() == ["1", "296", "x", "64", "8.500", f"{296 * 68:,}"]


def test_inspect_nothing(capsys, tmp_path):
    fails(capsys, str(tmp_path / "no"), "inspect", str(tmp_path / "no"))


# quantize


def test_quantize_is_plain_rounding(directory, ternary):
    config = TernaryConfig(group_size=32)
    expected = pack_(MambaLM.from_pretrained(directory), config).half().state_dict()
    model = MambaLM.from_pretrained(ternary)
    assert model.ternary == config
    assert model.dtype == torch.float16
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group-size", "48"], "group_size is 48, expected a positive multiple of 32"),
        (["--group-size", "96"], "group_size=96 does not divide in_features=64"),
        (["--rule", "median"], "rule is 'median', expected one of absmean, twn"),
        (["--rule", "learned", "--group-size", "32"], "rule 'learned' trains its scales: quantize_ and"),
        (["--modules", "nothing"], "no Linear"),
    ],
)
def test_quantize_refuses(directory, capsys, tmp_path, flags, words):
    fails(capsys, words, "quantize", directory, str(tmp_path / "out"), *flags)
    assert not (tmp_path / "out").exists()


def test_quantize_by_another_rule(directory, tmp_path):
    out = str(tmp_path / "out")
    assert cli.main(["quantize", directory, out, "--group-size", "32", "--rule", "mse"]) == 0
    config = TernaryConfig(group_size=32, rule="mse")
    expected, model = pack_(MambaLM.from_pretrained(directory), config), MambaLM.from_pretrained(out)
    assert model.ternary == config
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


def test_quantize_refuses_models(directory, ternary, capsys, tmp_path):
    fails(capsys, "is ternary already", "quantize", ternary, str(tmp_path / "out"))
    fails(capsys, "is the source as well", "quantize", directory, directory + "/.")


# distill


def test_distill_hands_over_its_flags(capsys, monkeypatch):
    @dataclass(frozen=True)
    class DistillConfig:
        """How.

        tokens: to train on,
            100 % of them.
        """

        ternary: TernaryConfig
        tokens: int
        learning_rate: float = 2.5e-4
        device: str = "cpu"
        loud: bool = False

    calls = []
    fake = SimpleNamespace(DistillConfig=DistillConfig, distill=lambda *a, **k: calls.append((a, k)))
    fake.replay = lambda *a, **k: calls.append((a, k)) or {"step": 7}
    monkeypatch.setitem(sys.modules, "ternary_ssm.distill", fake)
    argv = ["distill", "--teacher", "t", "--data", "d.npy", "--out", "o", "--tokens", "1000"]
    assert cli.main(argv) == 0
    assert calls.pop() == (("t", "d.npy", "o", DistillConfig(TernaryConfig(), 1000)), no_extras())
    more = ["--eval-data", "e.npy", "--resume", "--learning-rate", "1e-3", "--group-size", "tensor"]
    assert cli.main([*argv, *more, "--rule", "bounded"]) == 0
    config = DistillConfig(TernaryConfig(group_size="tensor", rule="bounded"), 1000, 1e-3)
    extras = no_extras() | {"eval_data": "e.npy", "resume": True}
    assert calls.pop() == (("t", "d.npy", "o", config), extras)
    assert cli.main([*argv, "--loud", "--teacher-cache", "c"]) == 0
    (*_, config), extras = calls.pop()
    assert config.loud and extras == no_extras() | {"teacher_cache": "c"}
    capsys.readouterr()
    assert cli.main([*argv, "--no-loud", "--replay", "x.json"]) == 0
    assert "'step': 7" in capsys.readouterr().out
    assert calls.pop() == (
        ("t", "d.npy", "o", DistillConfig(TernaryConfig(), 1000), "x.json"),
        {"teacher_cache": None},
    )

    fails(capsys, "--device is cuda:99", *argv, "--device", "cuda:99")
    fails(capsys, "is the source as well", "distill", "--teacher", "o", *argv[3:])
    with pytest.raises(SystemExit):
        cli.main(["distill", "--help"])
    assert re.search(r"--tokens TOKENS\s+to train on, 100 % of them\.\n", capsys.readouterr().out)


def no_extras() -> dict:
    return {"eval_data": None, "resume": False, "teacher_cache": None}


# flags


def parse(config: type, *argv: str):
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    return from_flags(config, parser.parse_args(argv))


def test_flags_are_the_fields():
    assert parse(SamplingConfig) == SamplingConfig()
    assert parse(TernaryConfig) == TernaryConfig()
    assert parse(SamplingConfig, "--eos-token-id", "4").eos_token_id == 4
    assert parse(SamplingConfig, "--eos-token-id", "4,5").eos_token_id == (4, 5)
    assert parse(SamplingConfig, "--eos-token-id", "").eos_token_id == ()
    assert parse(TernaryConfig, "--group-size", "64").group_size == 64
    assert parse(TernaryConfig, "--group-size", "row").group_size == "row"
    assert parse(TernaryConfig, "--modules", "in_proj,dt_proj").modules == ("in_proj", "dt_proj")


@pytest.mark.parametrize(
    ("config", "argv", "words"),
    [
        (SamplingConfig, ["--top-k", "many"], "argument --top-k: 'many' is not int | None"),
        (SamplingConfig, ["--eos-token-id", "4,x"], "argument --eos-token-id: '4,x' is not int | tuple"),
        (TernaryConfig, ["--group-size", "column"], "argument --group-size: 'column' is not int | Literal"),
    ],
)
def test_flags_of_the_wrong_kind(capsys, config, argv, words):
    with pytest.raises(SystemExit) as error:
        parse(config, *argv)
    assert error.value.code == 2
    assert words in capsys.readouterr().err


# The process


@pytest.mark.parametrize(
    "argv", [[], ["no-such-command"], ["generate"], ["inspect"], ["inspect", "a", "--no"]]
)
def test_bad_usage(argv, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert "usage: ternary-ssm" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["generate"], ["inspect"], ["quantize"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([*command, "--help"])
    assert error.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ternary-ssm")


def test_interrupt_is_quiet(ternary, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(MambaLM, "from_pretrained", interrupt)
    assert cli.main(["inspect", ternary]) == 130
    assert capsys.readouterr() == ("", "")


def test_closed_pipe_is_quiet(ternary):
    process = subprocess.Popen([*RUN, "inspect", ternary], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_damage_is_one_line(ternary, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"d_model": -1}))
    fails(capsys, "config.json", "inspect", str(tmp_path))
