"""llama.cpp computes from our GGUF files what we do (slow: llama-cpp-python is built from source)."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from ternary_ssm import MambaLM, pack_
from ternary_ssm.surgery import quantized_layers
from test_checkpoints import make
from test_gguf import G256, KINDS, MAMBA1, MAMBA2, TEACHER, export, logits, write_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run_llama_cpp(path: Path, ids: list[int]) -> tuple[object, torch.Tensor]:
    """The model, and its logits [l, v] of the tokens."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    llama.eval(ids)
    return llama, torch.tensor(llama.scores[: len(ids)])


def int8_activations(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What llama.cpp multiplies TQ blocks by: 256 activations share a scale."""
    x = args[0].unflatten(-1, (-1, 256))
    step = x.abs().amax(-1, keepdim=True) / 127
    return (((x / step).round() * step).flatten(-2),)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("config", [MAMBA1, MAMBA2], ids=["mamba1", "mamba2"])
def test_llama_cpp_computes_the_same(config, kind, tied, source, tmp_path):
    model = make(dataclasses.replace(config, tie_embeddings=tied), KINDS.get(kind))
    with torch.no_grad():  # else the residual is all there is
        for block in model.backbone.layers:
            block.norm.weight.uniform_(1, 4)
            block.mixer.D.uniform_(-1, 1)
    model = model.half().float()  # F16 then rounds nothing, which would flip int8 activations
    for _, layer in quantized_layers(model):
        layer.register_forward_pre_hook(int8_activations)
    for type_ in ("f16",) if kind is None else ("tq2_0", "tq1_0"):
        _, found = run_llama_cpp(export(model, tmp_path / f"{type_}.gguf", source, type_), list(range(40)))
        want = logits(model)[0]
        error = (found - want).norm() / want.norm()
        assert error < (2e-3 if kind is None else 1e-2), error


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "tq2_0", "tq1_0"])
def test_llama_cpp_generates_the_same(kind, tmp_path):
    model = MambaLM.from_pretrained(TEACHER, dtype=torch.float32)
    if kind != "f16":
        pack_(model, G256)
    path = export(model, tmp_path / "m.gguf", TEACHER, kind)
    tokenizer = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
    for prompt in ("The history of the", "In the year 1843, it's said", "über  – naïve\n\ttext"):
        ids = tokenizer.encode(prompt).ids
        (row,) = model.generate([ids], 24)
        llama, found = run_llama_cpp(path, row)
        assert llama.tokenize(prompt.encode(), add_bos=False, special=False) == ids
        with torch.no_grad():
            want = model(torch.tensor([row])).logits[0].log_softmax(-1)
        found = found.log_softmax(-1)
        divergence = (want.exp() * (want - found)).sum(-1)
        assert divergence.max() < (1e-4 if kind == "f16" else 2e-2)  # llama.cpp's activations are int8 there
        if kind == "f16":
            assert torch.equal(found.argmax(-1)[len(ids) - 1 : -1], torch.tensor(row[len(ids) :]))
