"""Directories that mamba_ssm wrote."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ternary_ssm import MambaLM
from ternary_ssm.checkpoints import CheckpointError
from test_checkpoints import MAMBA1, MAMBA2, edit_tensors, make, same


def write_mamba_ssm(model: MambaLM, directory: Path, file: str, **changes) -> None:
    """As mamba_ssm's save_pretrained does: a tied head is written too, the embedding is singular."""
    config = model.config
    names = ("d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg")
    names += ("rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings")
    values = {name: getattr(config, name) for name in names} | changes
    tensors = {n.replace("embeddings", "embedding"): t.clone() for n, t in model.state_dict().items()}
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    if file.endswith(".safetensors"):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / file)
    else:
        torch.save(tensors, directory / file, _use_new_zipfile_serialization="old" not in str(directory))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rms_norm": False},
        {"pad_vocab_size_multiple": 16, "tie_embeddings": False},
        {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "ngroups": 4, "rmsnorm": False}},
        {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "dt_limit": (0.0, math.inf), "A_init_range": [1, 16]}},
        {"ssm_cfg": {"layer": "Mamba1"}, "pad_vocab_size_multiple": 8},
    ],
)
def test_mamba_ssm_directories(changes, file, tmp_path):
    model = make(dataclasses.replace(MAMBA2, **changes))
    write_mamba_ssm(model, tmp_path, file)
    loaded = MambaLM.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), model.state_dict())
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_mamba_ssm_without_a_layer_is_mamba1(tmp_path):
    model = make(MAMBA1)
    write_mamba_ssm(model, tmp_path, "pytorch_model.bin", ssm_cfg={"d_state": 4})
    assert same(MambaLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_pickles_from_before_pytorch_1_6(tmp_path):
    model = make()
    write_mamba_ssm(model, tmp_path / "old", "pytorch_model.bin")
    assert (tmp_path / "old" / "pytorch_model.bin").read_bytes()[:2] != b"PK"
    assert same(MambaLM.from_pretrained(tmp_path / "old").state_dict(), model.state_dict())


def test_a_tied_head_that_differs_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    edit_tensors(tmp_path, lm_head__weight=torch.ones(56, 32))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not backbone.embeddings"):
        MambaLM.from_pretrained(tmp_path)
