"""GGUF files: what is exported is what is imported, and llama.cpp computes the same from it."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, cli
from ternary_ssm.checkpoints import CheckpointError
from ternary_ssm.checkpoints import gguf as ours
from ternary_ssm.checkpoints.gguf_read import _our_tensor
from test_checkpoints import edit_json, make, same

gguf = pytest.importorskip("gguf")

MAMBA1 = MambaConfig(
    d_model=256,
    n_layer=2,
    vocab_size=290,
    ssm_cfg={"layer": "Mamba1", "d_state": 4},
    eos_token_id=0,
    bos_token_id=0,
)
MAMBA2 = dataclasses.replace(MAMBA1, ssm_cfg={"headdim": 64, "d_state": 16, "ngroups": 2})
G256 = TernaryConfig(group_size=256)
TEACHER = Path(__file__).parent.parent / "models" / "tiny-english" / "teacher"


def write_tokenizer(path: Path) -> Path:
    """Gives a directory a tokenizer.json of 290 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=289, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        ["the small model reads a small text, and the text is read – über alles."], trainer
    )
    tokenizer.add_tokens(["   "])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def export(model: MambaLM, path: Path, source: Path, kind: str | None = None) -> Path:
    kind = kind or ("tq2_0" if model.ternary else "f16")
    ours.write(path, model.config, model.ternary, model.state_dict(), source, kind)
    return path


def logits(model: MambaLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def check(loaded: MambaLM, model: MambaLM) -> None:
    """Codes and plain tensors bit for bit; scales by weight; A, not its logarithm."""
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, want in before.items():
        if name.endswith("_scale"):
            k = 4 * before[name.removesuffix("_scale")].shape[1]
            n = len(before[name.removesuffix("_scale")])
            wide = [s.float().repeat_interleave(k // s.shape[1], 1).expand(n, k) for s in (want, after[name])]
            assert torch.equal(*wide), name
        elif name.endswith("A_log"):
            assert torch.equal(after[name].exp(), want.exp())
            assert (after[name] - want).abs().max() < 2.5e-7
        else:
            assert after[name].dtype == want.dtype and torch.equal(after[name], want), name
    assert torch.equal(logits(loaded), logits(model))


KINDS = {
    "g256": G256,
    "row": TernaryConfig(group_size="row"),
    "tensor": TernaryConfig(group_size="tensor"),
    "fp32": TernaryConfig(group_size="tensor", scale_dtype="float32"),
    "int8": TernaryConfig(group_size=256, embedding="int8"),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("config", [MAMBA1, MAMBA2], ids=["mamba1", "mamba2"])
def test_round_trip(config, kind, tied, tokenizer, tmp_path):
    model = make(dataclasses.replace(config, tie_embeddings=tied), KINDS.get(kind), dtype=torch.float16)
    for type_ in ("f16",) if kind is None else ("tq2_0", "tq1_0"):
        path = export(model, tmp_path / f"{type_}.gguf", tokenizer, type_)
        loaded = MambaLM.from_pretrained(path, dtype=torch.float16)
        check(loaded, model)
        for name in ("vocab_size", "padded_vocab_size", "tie_embeddings", "norm_epsilon", "eos_token_id"):
            assert getattr(loaded.config, name) == getattr(model.config, name)
        if kind not in (None, "int8"):
            group = {"fp32": "tensor", "g256": 256}.get(kind, kind)
            assert (loaded.ternary.group_size, loaded.ternary.modules) == (group, ("in_proj", "out_proj"))
        loaded.save_pretrained(tmp_path / "again")
        assert same(
            MambaLM.from_pretrained(tmp_path / "again", dtype=torch.float16).state_dict(), loaded.state_dict()
        )


def test_default_dtype_is_that_of_the_matrices(tokenizer, tmp_path):
    path = export(make(MAMBA2, G256, dtype=torch.float16), tmp_path / "m.gguf", tokenizer)
    assert MambaLM.from_pretrained(path).dtype == torch.float16


def test_ternary_as_f16(tokenizer, tmp_path):
    model = make(MAMBA2, TernaryConfig(group_size=32), dtype=torch.float16)
    loaded = MambaLM.from_pretrained(export(model, tmp_path / "m.gguf", tokenizer, "f16"))
    assert loaded.ternary is None
    dense = model.backbone.layers[1].mixer.in_proj.ternary.dequantize()
    assert torch.equal(loaded.backbone.layers[1].mixer.in_proj.weight.float(), dense)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["f16", "tq2_0"])
def test_ternary_tables_become_f16(kind, tied, tokenizer, tmp_path):
    config = dataclasses.replace(MAMBA2, tie_embeddings=tied)
    ternary = TernaryConfig(group_size=256, embedding="ternary")
    model = make(config, ternary, dtype=torch.float16)
    loaded = MambaLM.from_pretrained(export(model, tmp_path / "m.gguf", tokenizer, kind))
    assert kind == "f16" or loaded.ternary.embedding == "float"
    for theirs, own in ((loaded.backbone.embeddings, model.backbone.embeddings), (loaded.head, model.head)):
        assert torch.equal(theirs.weight.float(), own.ternary.dequantize())


def test_some_layers_and_groups_whose_neighbours_agree(tokenizer, tmp_path):
    names = ("backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.x_proj")
    model = make(MAMBA1, TernaryConfig(group_size=128, modules=names), dtype=torch.float16)
    with pytest.raises(
        CheckpointError,
        match=r"layers.0.mixer.in_proj.weight has several scales in row 0, "
        r"columns 0 to 255, expected one: group_size is 128",
    ):
        export(model, tmp_path / "m.gguf", tokenizer)
    for name in names:
        scales = model.get_submodule(name).weight_scale
        scales[:, 1::2] = scales[:, ::2]
    loaded = MambaLM.from_pretrained(export(model, tmp_path / "m.gguf", tokenizer))
    check(loaded, model)
    assert loaded.ternary.modules == names and loaded.ternary.group_size == 256


def test_blocks_of_zeros_keep_their_scales(tokenizer, tmp_path):
    model = make(MAMBA2, G256, dtype=torch.float16)
    model.backbone.layers[0].mixer.out_proj.weight[:, :64] = 0
    model.backbone.layers[0].mixer.out_proj.weight_scale[3] = 0
    for kind in ("tq2_0", "tq1_0"):
        check(MambaLM.from_pretrained(export(model, tmp_path / "m.gguf", tokenizer, kind)), model)


@pytest.mark.parametrize("config", [MAMBA1, MAMBA2], ids=["mamba1", "mamba2"])
def test_llama_cpps_reader_agrees(config, tokenizer, tmp_path):
    model = make(config, KINDS["int8"], dtype=torch.float16)
    for kind in ("tq2_0", "tq1_0"):
        reader = gguf.GGUFReader(export(model, tmp_path / "m.gguf", tokenizer, kind))
        tensors = {t.name: t for t in reader.tensors}
        mixer = model.backbone.layers[1].mixer
        weight = tensors["blk.1.ssm_in.weight"]
        assert weight.tensor_type.name == kind.upper() and [*weight.shape] == [256, config.in_proj_rows]
        found = gguf.quants.dequantize(weight.data, weight.tensor_type)
        assert np.array_equal(found, mixer.in_proj.ternary.dequantize().numpy())
        table, want = tensors["token_embd.weight"], model.backbone.embeddings
        found = gguf.quants.dequantize(table.data, table.tensor_type)
        assert np.array_equal(found, (want.weight.float() * want.weight_scale.float()).numpy())
        shapes = {
            key: [*map(int, tensors[f"blk.0.{key}"].shape)] for key in ("ssm_a", "ssm_d", "ssm_conv1d.weight")
        }
        heads = config.nheads if config.is_mamba2 else 0
        assert shapes["ssm_a"] == ([1, heads] if heads else [4, 512])
        assert shapes["ssm_d"] == ([1, heads] if heads else [512])
        assert shapes["ssm_conv1d.weight"] == [4, config.conv_channels]
        if heads:
            assert [*tensors["blk.0.ssm_norm.weight"].shape] == [256, 2]
        for name, tensor in tensors.items():
            assert tensor.tensor_type.name in (kind.upper(), "Q8_0", "F16", "F32")
            if not re.search(r"(token_embd|ssm_(in|out|x|dt))\.weight", name):
                assert tensor.tensor_type.name == "F32", name


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "F32", "BF16"])
def test_files_that_llama_cpps_writer_quantized(kind, tokenizer, tmp_path):
    """Blocks made by the package gguf from any floats; all other tensors as exported."""
    reader = gguf.GGUFReader(export(make(MAMBA2), tmp_path / "ours.gguf", tokenizer))
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "mamba2")
    for field in reader.fields.values():
        if field.name.startswith("mamba2.") and "vocab_size" not in field.name:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    wanted, quant = {}, gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        data, raw = np.array(tensor.data), None
        if "ssm_in" in tensor.name or "ssm_out" in tensor.name:
            raw, data = quant, gguf.quants.quantize(data.astype(np.float32), quant)
            wanted[tensor.name] = gguf.quants.dequantize(data, quant)
        writer.add_tensor(tensor.name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = MambaLM.from_pretrained(tmp_path / "theirs.gguf")
    assert model.config.vocab_size == model.config.padded_vocab_size == 296  # there is no key
    for i, layer in enumerate(model.backbone.layers):
        for key, linear in (("ssm_in", layer.mixer.in_proj), ("ssm_out", layer.mixer.out_proj)):
            found = linear.ternary.dequantize() if kind.startswith("TQ") else linear.weight.float()
            assert np.array_equal(found.detach().numpy(), wanted[f"blk.{i}.{key}.weight"])


def test_A_log_is_recovered():
    A_log = torch.linspace(-10, 10, 100_003)
    found = _our_tensor(Path("m"), "x.A_log", -A_log.exp().unsqueeze(1), is_mamba2=True)
    A, again = A_log.exp(), found.exp()
    assert ((A == again) | (A.nextafter(again) == again)).all()  # within 1 ulp, exact where exp is
    assert (A == again).float().mean() > 0.999


def test_tokenizer(tokenizer, tmp_path):
    reader = gguf.GGUFReader(export(make(MAMBA2), tmp_path / "m.gguf", tokenizer))
    get = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in reader.fields.items()}
    vocab = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab()
    assert len(get["tokens"]) == len(get["token_type"]) == 296 and len(vocab) == 290
    assert {text: id for id, text in enumerate(get["tokens"][:290])} == vocab
    assert get["tokens"][290] == "[PAD290]"
    assert get["token_type"] == [3] + [1] * 288 + [4] + [5] * 6
    assert (get["model"], get["pre"], get["bos_token_id"], get["eos_token_id"]) == ("gpt2", "gpt-2", 0, 0)
    assert get["add_bos_token"] is False and "padding_token_id" not in get
    merges = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["merges"]
    assert [merge.split(" ") for merge in get["merges"]] == [[*merge] for merge in merges]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre_tokenizer": None}, "is a BPE with .*'type': None.*expected a BPE with .*ByteLevel"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "'add_prefix_space': True"),
        ({"model": models.WordLevel({"a": 0}, unk_token="a")}, "is a WordLevel"),
        ({"normalizer": normalizers.Lowercase()}, "has the normalizer Lowercase"),
        ({"add_tokens": [f"more{i}" for i in range(9)]}, "has the token id 298, the model's last is 295"),
        (
            {"post_processor": processors.TemplateProcessing("$A a", special_tokens=[("a", 40)])},
            r"adds the tokens \[40\] to texts, expected none or \[0\]",
        ),
    ],
)
def test_tokenizers_that_are_refused(change, words, tokenizer, tmp_path):
    changed = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for name, value in change.items():
        if name == "add_tokens":
            changed.add_tokens(value)
        elif value is not None:
            setattr(changed, name, value)
    changed.save(str(tmp_path / "tokenizer.json"))
    if None in change.values():
        edit_json(tmp_path / "tokenizer.json", **change)
    with pytest.raises(CheckpointError, match=words):
        export(make(MAMBA2), tmp_path / "m.gguf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_broken_tokenizers(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        export(make(MAMBA2), tmp_path / "m.gguf", tmp_path)
    good = json.loads((tokenizer / "tokenizer.json").read_text())
    for broken in ({}, good | {"model": {"type": "BPE"}}, good | {"added_tokens": [3]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: "):
            export(make(MAMBA2), tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize(
    ("config", "ternary", "kind", "words"),
    [
        (MAMBA2, None, "tq2_0", "tq2_0 needs a ternary model, found a dense one; expected type f16"),
        (MAMBA2, None, "q4_0", "type is 'q4_0', expected one of f16, tq2_0, tq1_0"),
        (MAMBA2, TernaryConfig(group_size=64), "tq1_0", "group_size is 64, TQ types hold multiples of 256"),
        (MAMBA2, TernaryConfig(group_size=256, scale_dtype="float32"), "tq2_0", "float16 does not hold"),
        (
            dataclasses.replace(MAMBA2, d_model=128),
            TernaryConfig(group_size=128),
            "tq2_0",
            r"layers.0.mixer.in_proj.weight has 128 columns, expected a multiple of 256",
        ),
        (
            MAMBA1,
            TernaryConfig(group_size="tensor", scale_dtype="float32", modules=("x_proj",)),
            "tq2_0",
            "x_proj.weight has a torch.float32 scale, llama.cpp wants float16 there",
        ),
        (
            MAMBA2,
            TernaryConfig(group_size="tensor", scale_dtype="float32", embedding="int8"),
            "tq2_0",
            "Q8_0 wants a multiple of 32 columns and float16 scales, found 256 columns and torch.float32",
        ),
        ({"rms_norm": False}, None, "f16", "rms_norm is False, llama.cpp runs only True"),
        ({"bias": True}, None, "f16", "bias is True"),
        ({"conv_bias": False}, None, "f16", "conv_bias is False"),
        ({"rmsnorm": False}, None, "f16", "rmsnorm is False"),
        ({"norm_before_gate": True}, None, "f16", "norm_before_gate is True"),
        ({"D_has_hdim": True}, None, "f16", "D_has_hdim is True"),
        ({"norm_groups": 1}, None, "f16", "norm_groups is 1, llama.cpp runs only 2"),
        ({"dt_limit": (0.001, math.inf)}, None, "f16", r"dt_limit is \(0.001, None\)"),
        ({"layer": "Mamba1", "expand": 3}, None, "f16", "expand is 3, llama.cpp runs only 2"),
    ],
)
def test_models_that_are_refused(config, ternary, kind, words, tokenizer, tmp_path):
    if isinstance(config, dict) and "rms_norm" in config:
        config = dataclasses.replace(MAMBA2, **config)
    elif isinstance(config, dict):
        ssm_cfg = config if "layer" in config else MAMBA2.ssm_cfg | config
        config = dataclasses.replace(MAMBA2, ssm_cfg=ssm_cfg)
    path = tmp_path / "m.gguf"
    path.write_text("what was there")
    with pytest.raises(CheckpointError, match=words):
        export(make(config, ternary), path, tokenizer, kind)
    assert path.read_text() == "what was there" and [*tmp_path.iterdir()] == [path]


def test_values_beyond_f16(tokenizer, tmp_path):
    model = make(MAMBA2)
    model.backbone.embeddings.weight.data[3, 4] = 1e6
    with pytest.raises(CheckpointError, match=r"embeddings\.weight has values beyond F16"):
        export(model, tmp_path / "m.gguf", tokenizer)
    with pytest.raises(CheckpointError, match="is a directory"):
        export(make(MAMBA2), tmp_path, tokenizer)


def test_without_the_package(tokenizer, tmp_path, monkeypatch):
    path = export(make(MAMBA2), tmp_path / "m.gguf", tokenizer)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the package gguf: pip install 'ternary-ssm\[gguf\]'"):
        export(make(MAMBA2), tmp_path / "n.gguf", tokenizer)
    MambaLM.from_pretrained(path)  # reading does not need it


def test_command(tokenizer, tmp_path, capsys):
    directory, out = tmp_path / "model", str(tmp_path / "model" / "m.gguf")
    make(MAMBA2, G256, dtype=torch.float16).save_pretrained(directory, copy_from=tokenizer)
    assert cli.main(["export", str(directory), out]) == 0
    assert MambaLM.from_pretrained(out).ternary.group_size == 256
    assert cli.main(["inspect", out]) == 0 and "ternary, group size 256" in capsys.readouterr().out
    arguments = ["--prompt", "the", "--max-new-tokens", "4", "--temperature", "0"]
    assert cli.main(["generate", "--model", str(directory), *arguments]) == 0
    text = capsys.readouterr().out
    assert cli.main(["generate", "--model", out, *arguments]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["export", str(directory), out, "--type", "f16"]) == 0
    assert MambaLM.from_pretrained(out).ternary is None
    assert cli.main(["export", str(directory), str(tmp_path / "m.bin")]) == 1
    assert "expected a file name that ends in .gguf" in capsys.readouterr().err
