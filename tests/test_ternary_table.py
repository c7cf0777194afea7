"""Ternary embedding and head: the table, trained, packed, in files and in runs."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, cli, pack_, quantize_, runs
from ternary_ssm.checkpoints import CheckpointError, files
from ternary_ssm.layers import TernaryLinear, TernaryTable
from ternary_ssm.reference import ReferenceMode
from ternary_ssm.surgery import quantized_layers
from test_checkpoints import MAMBA2, edit_json, edit_tensors, make
from test_distill import BATCH, LENGTH, VOCAB, logged, make_distiller, make_teacher, one_thread, plain_loss  # noqa: F401
from test_surgery import CLOSE, logits, own_model, transformers_model

TERNARY = TernaryConfig(group_size=32, embedding="ternary")
TABLES = ["backbone.embeddings", "lm_head"]


@pytest.mark.parametrize("group", [32, "row", "tensor"])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_dequantized_table(device, group, scale_dtype, dtype):
    config = TernaryConfig(group_size=group, scale_dtype=scale_dtype)
    table = TernaryTable.from_dense(nn.Embedding(41, 64), config).to(device, torch.bfloat16)
    assert table.weight_scale.dtype == config.torch_scale_dtype  # a cast leaves it alone
    rows = table.ternary.dequantize(dtype)
    for shape in [(), (0,), (1,), (2, 3), (2, 0, 1), (50,)]:
        ids = torch.randint(41, shape, device=device)
        assert torch.equal(table(ids, dtype), rows[ids])
    x = torch.randn(2, 3, 64, device=device, dtype=dtype)
    found, exact = table.logits(x), x.double() @ table.ternary.dequantize().double().T
    assert found.dtype == dtype and found.shape == (2, 3, 41)
    eps = max(torch.finfo(dtype).eps, 2**-16)  # a CPU takes 16 bits of x
    limit = 4 * eps * exact.abs().max().item()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=limit)


def test_a_vocabulary_of_one_row():
    table = TernaryTable.from_dense(nn.Embedding(1, 64), TERNARY)
    assert torch.equal(
        table(torch.zeros(3, dtype=torch.int64), torch.float32), table.ternary.dequantize()[[0] * 3]
    )


# --- surgery ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_packed_equals_trained(layer, tied):
    model = quantize_(own_model(layer, tie_embeddings=tied), TERNARY).eval()
    tables = TABLES[: 1 if tied else 2]
    names = {name for name, _ in quantized_layers(model)}
    assert len(names) == 4 + len(tables) and names >= set(tables)
    packed = pack_(copy.deepcopy(model))
    assert {name for name, _ in quantized_layers(packed)} == names and packed.ternary == TERNARY
    assert all(isinstance(packed.get_submodule(name), TernaryTable) for name in tables)
    assert not [name for name, _ in packed.named_parameters() if name.startswith(tuple(TABLES))]
    with torch.no_grad(), ReferenceMode():
        assert torch.equal(logits(packed), logits(model))
    with torch.no_grad():
        torch.testing.assert_close(logits(packed), logits(model), **CLOSE)


@pytest.mark.parametrize("tied", [True, False])
def test_packing_a_dense_model_rounds_it(tied):
    model = own_model("Mamba2", tie_embeddings=tied)
    trained, packed = pack_(quantize_(copy.deepcopy(model), TERNARY)), pack_(model, TERNARY)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_gradients_go_straight_through(layer, tied):
    model = quantize_(own_model(layer, tie_embeddings=tied), TERNARY)
    dense = own_model(layer, tie_embeddings=tied)  # the same values as plain parameters
    for name, module in quantized_layers(model):
        dense.get_submodule(name).weight.data = module.weight.detach().clone()
    for m in (model, dense):
        logits(m).logsumexp(-1).square().sum().backward()
    for name, module in quantized_layers(model):
        expected = dense.get_submodule(name).weight.grad
        assert expected.abs().sum() > 0
        torch.testing.assert_close(
            module.parametrizations.weight.original.grad,
            expected,
            rtol=1e-4,
            atol=1e-6 * expected.abs().max(),
        )


def test_the_filter_does_not_choose_tables():
    choose = lambda module, name: name.endswith("in_proj") or name == "lm_head"  # noqa: E731
    model = pack_(own_model("Mamba2", tie_embeddings=False), TERNARY, filter_fn=choose)
    kinds = {name: type(m) for name, m in quantized_layers(model)}
    projections = [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]
    assert kinds == dict.fromkeys(TABLES, TernaryTable) | dict.fromkeys(projections, TernaryLinear)
    assert model.ternary == dataclasses.replace(TERNARY, modules=tuple(projections))


@pytest.mark.parametrize("embedding", ["int8", "ternary"])
def test_refuses_other_libraries_models(embedding):
    config = TernaryConfig(group_size=32, embedding=embedding)
    for surgery in (quantize_, pack_):
        model = transformers_model("Mamba2")
        with pytest.raises(
            ValueError, match=f"embedding is '{embedding}', Mamba2ForCausalLM takes only 'float'"
        ):
            surgery(model, config)
        assert not list(quantized_layers(model))


def test_refuses_a_width_that_no_group_divides():
    config = TernaryConfig(group_size=64, modules=("out_proj",), embedding="ternary")
    model = MambaLM(MambaConfig(d_model=96, n_layer=1, vocab_size=9, ssm_cfg={"layer": "Mamba1"}))
    words = "group_size=64 does not divide in_features=96"
    with pytest.raises(ValueError, match=f"backbone.embeddings: {words}"):
        quantize_(model, config)
    assert not list(quantized_layers(model))
    with pytest.raises(ValueError, match=words):
        MambaLM(model.config, config)


# --- files --------------------------------------------------------------------------------------------------


def test_names_and_types_in_files(tmp_path):
    make(dataclasses.replace(MAMBA2, tie_embeddings=False), TERNARY).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / files.SINGLE)
    for table in TABLES:
        weight, scale = tensors[f"{table}.weight"], tensors[f"{table}.weight_scale"]
        assert (weight.dtype, weight.shape) == (torch.uint8, (56, 8))
        assert (scale.dtype, scale.shape) == (torch.float16, (56, 1))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["embedding"] == "ternary"


def test_broken_files(tmp_path):
    model = make(dataclasses.replace(MAMBA2, tie_embeddings=False), TERNARY)
    model.save_pretrained(tmp_path)
    good = (tmp_path / files.SINGLE).read_bytes()
    codes, scales = model.lm_head.weight.clone(), model.lm_head.weight_scale
    codes[5, 3] = 0b01_10_11_00
    for changes, words in (
        ({"lm_head__weight": codes}, r"lm_head.weight has the code 10 in row 5, column 14,"),
        ({"backbone__embeddings__weight": codes}, r"embeddings.weight has the code 10 in row 5, column 14,"),
        (
            {"lm_head__weight_scale": -scales},
            r"lm_head.weight_scale has \[-.*\] in row 0, expected finite scales",
        ),
        (
            {"lm_head__weight_scale": scales.float()},
            "lm_head.weight_scale is torch.float32, expected torch.float16",
        ),
        (
            {"lm_head__weight_scale": scales[:1].clone()},
            r"lm_head.weight_scale is \[1, 1\], expected \[56, 1\]",
        ),
        ({"lm_head__weight": None}, "missing tensors lm_head.weight, unexpected none"),
        (
            {"backbone__embeddings__weight": torch.ones(56, 32)},
            r"is \[56, 32\], config.json expects \[56, 8\]",
        ),
    ):
        (tmp_path / files.SINGLE).write_bytes(good)
        edit_tensors(tmp_path, **changes)
        with pytest.raises(CheckpointError, match=words):
            MambaLM.from_pretrained(tmp_path)
    (tmp_path / files.SINGLE).write_bytes(good)
    config = tmp_path / "config.json"
    edit_json(config, quantization_config=TERNARY.to_dict() | {"embedding": "int8"})
    with pytest.raises(CheckpointError, match=r"is \[56, 8\], config.json expects \[56, 32\]"):
        MambaLM.from_pretrained(tmp_path)


# --- training -----------------------------------------------------------------------------------------------


def test_the_head_of_a_step_is_the_rounded_embedding(tmp_path):
    d = make_distiller(tmp_path, grad_clip=1e9, ternary=TERNARY)
    dense = copy.deepcopy(d.teacher).requires_grad_(True)  # the same model with the rounded weights in it
    for name, layer in quantized_layers(d.student):
        dense.get_submodule(name).weight.data = layer.weight.detach().clone()
    latent, grads = d.student.backbone.embeddings.parametrizations.weight.original, []
    d.optimizer.step = lambda: grads.append(latent.grad.clone())
    record = d.train_step()
    ids = d.stream.batch(0)
    hidden, hidden_t = dense.backbone(ids[:, :-1]), d.teacher.backbone(ids[:, :-1])
    loss = plain_loss(hidden, hidden_t, dense.head.weight, d.teacher.head.weight, ids[:, 1:], 0.5, 1.0)[0]
    loss.backward()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(grads[0], dense.head.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"ternary": TERNARY, "dtype": "bfloat16", "recompute": 1.0},
        {"ternary": dataclasses.replace(TERNARY, rule="learned"), "anneal_ratio": 0.5, "teacher_top_k": 8},
        {"ternary": TERNARY, "reset_at_documents": True, "document_ends": (3,), "micro_batch_size": 2},
    ],
)
def test_a_resumed_run_is_the_unbroken_one(tmp_path, options):
    whole = make_distiller(tmp_path / "whole", steps=4, **copy.deepcopy(options))
    whole.train()
    broken = make_distiller(tmp_path / "broken", steps=4, **copy.deepcopy(options))
    if broken.config.teacher_top_k:
        broken._fill_cache()
    for _ in range(2):
        broken.train_step()
    broken.save()
    resumed = make_distiller(tmp_path / "broken", steps=4, **copy.deepcopy(options))
    resumed.train(resume=True)
    steps = [[r for r in logged(tmp_path / name) if "loss" in r] for name in ("whole", "broken")]
    assert steps[1] == steps[0][2:]
    assert 0.2 < steps[0][-1]["zero_ratio"]["backbone.embeddings"] < 0.6
    with torch.no_grad():
        trained = resumed.student.eval()(torch.arange(9)[None]).logits
    packed = resumed.packed()
    assert isinstance(packed.backbone.embeddings, TernaryTable)
    with torch.no_grad():
        torch.testing.assert_close(
            packed.float()(torch.arange(9)[None]).logits, trained, rtol=0.01, atol=0.01
        )


def test_with_dense_rows_it_is_saved_as_its_values(tmp_path):
    d = make_distiller(tmp_path, ternary=TERNARY, ternary_rows=("z", "x"))
    rounded = d.student.backbone.embeddings.weight.detach()
    table = d.packed().backbone.embeddings
    assert type(table) is nn.Embedding and torch.equal(table.weight, rounded.half())


def test_the_command(tmp_path, capsys):
    make_teacher().save_pretrained(tmp_path / "teacher")
    np.save(tmp_path / "data.npy", np.arange(400) % VOCAB)
    sizes = {"tokens": 2 * BATCH * LENGTH, "sequence-length": LENGTH, "batch-size": BATCH, "group-size": 32}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    paths = ["--teacher", str(tmp_path / "teacher"), "--data", str(tmp_path / "data.npy")]
    out = str(tmp_path / "out")
    assert cli.main(["distill", *paths, "--out", out, *flags, "--embedding", "ternary"]) == 0
    model = MambaLM.from_pretrained(out)
    assert model.ternary == TERNARY
    assert "backbone.embeddings" in runs.read_metrics(tmp_path / "out")[-1]["zero_ratio"]
    capsys.readouterr()
    assert cli.main(["inspect", out]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "embeddings" in line)
    zeros = f"{model.backbone.embeddings.ternary.zero_ratio():.3f}"
    assert row[1:] == ["1", str(VOCAB), "x", "64", "2.500", f"{VOCAB * 20:,}", zeros]
