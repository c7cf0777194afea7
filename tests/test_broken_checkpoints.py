"""Broken, hostile and unsupported checkpoints are refused in words, and never crash."""

import copy
import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ternary_ssm import MambaLM, checkpoints
from ternary_ssm.checkpoints import CheckpointError, files
from test_checkpoints import (
    BIG,
    KINDS,
    MAMBA2,
    SMALL,
    TERNARY,
    edit_json,
    edit_tensors,
    make,
)
from test_mamba_ssm_checkpoints import write_mamba_ssm


def test_missing_and_strange_files(tmp_path):
    def refused(words: str, directory: Path = tmp_path) -> None:
        with pytest.raises(CheckpointError, match=words):
            MambaLM.from_pretrained(directory)

    refused("config.json: no such file", tmp_path / "nowhere")
    refused("config.json: no such file")
    config = tmp_path / "config.json"
    for text, words in (
        ("", "Expecting value"),
        ("{", "config.json: "),
        ("[]", "holds a list"),
        ("[" * 10**5, "Recursion"),
    ):
        config.write_text(text)
        refused(words)
    config.write_text("{}")
    refused("model_type is None and there is no d_model, expected model_type 'mamba'")
    config.write_text('{"model_type": "llama"}')
    refused("model_type is 'llama'")
    make().save_pretrained(tmp_path)
    weights = tmp_path / files.SINGLE
    data = weights.read_bytes()
    for broken in (b"", data[:7], data[:100], data[:-1], data + b"x", b"\xff" * 8 + data[8:]):
        weights.write_bytes(broken)
        refused("model.safetensors: ")
    weights.unlink()
    refused("no weights, expected model.safetensors or")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin: ")
    with pytest.raises(CheckpointError, match="is a file, expected a directory"):
        make().save_pretrained(config)


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def test_pickles_hold_tensors_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mamba_ssm(make(), tmp_path, "pytorch_model.bin")
    for content, words in (
        ({"x": Exploit()}, "pytorch_model.bin: UnpicklingError"),
        ([torch.ones(2)], "holds a list"),
        ({"x": 1}, "'x' is a int, expected tensors by name"),
        ({3: torch.ones(2)}, "3 is a Tensor, expected tensors by name"),
        ({"x": torch.eye(2).to_sparse()}, "x is a torch.sparse_coo"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"x": torch.ones(2, device="meta")}, "on meta"),
    ):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=words):
            MambaLM.from_pretrained(tmp_path)
    assert not (tmp_path / "exploited").exists()


IN_PROJ = "backbone__layers__1__mixer__in_proj__weight"


def test_tensors_that_do_not_fit(tmp_path):
    model = make(MAMBA2, KINDS["int8"])
    model.save_pretrained(tmp_path)
    good = (tmp_path / files.SINGLE).read_bytes()
    state = model.state_dict()
    codes, scales = state[IN_PROJ.replace("__", ".")], state[f"{IN_PROJ}_scale".replace("__", ".")]
    invalid = codes.clone()
    invalid[5, 3] = 0b01_10_11_00
    nan, negative = scales.clone(), scales.clone()
    nan[7, 0], negative[9, 0] = math.nan, -1
    where = r"backbone\.layers\.1\.mixer\.in_proj\.weight"
    for changes, words in (
        ({IN_PROJ: None}, rf"missing tensors {where}, unexpected none"),
        ({"extra": torch.ones(1)}, r"missing tensors none, unexpected extra"),
        ({IN_PROJ: codes[:-1].clone()}, rf"{where} is \[\d+, 8\], expected \[\d+, 8\]"),
        ({IN_PROJ: codes.to(torch.int8)}, rf"{where} is torch.int8, expected torch.uint8"),
        ({IN_PROJ: codes.float()}, rf"{where} is torch.float32, expected torch.uint8"),
        ({f"{IN_PROJ}_scale": scales.float()}, rf"{where}_scale is torch.float32, expected torch.float16"),
        (
            {f"{IN_PROJ}_scale": scales.repeat(1, 2)},
            rf"{where}_scale is \[\d+, 2\], expected .*group_size=32",
        ),
        ({f"{IN_PROJ}_scale": nan}, rf"{where}_scale has \[nan\] in row 7"),
        ({f"{IN_PROJ}_scale": negative}, rf"{where}_scale has \[-1.0\] in row 9"),
        ({IN_PROJ: invalid}, rf"{where} has the code 10 in row 5, column 14,"),
        ({"backbone__norm_f__weight": torch.ones(32, dtype=torch.int8)}, "norm_f.weight is torch.int8"),
        ({"backbone__embeddings__weight": None}, "no tensor backbone.embeddings.weight"),
        (
            {"backbone__embeddings__weight": torch.ones(50, 32)},
            r"is \[50, 32\], config.json expects \[56, 32\]",
        ),
        ({"backbone__embedding__weight": torch.ones(56, 32)}, "both backbone.embedding and"),
        ({"backbone__layers__2__norm__weight": torch.ones(32)}, "3 layers in the weights, 2 in config.json"),
    ):
        (tmp_path / files.SINGLE).write_bytes(good)
        edit_tensors(tmp_path, **changes)
        with pytest.raises(CheckpointError, match=words):
            MambaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("byte", range(256))
def test_every_invalid_code_is_found(byte):
    codes = torch.zeros(3, 5, dtype=torch.uint8)
    codes[1, 4] = byte
    fields = [byte >> shift & 3 for shift in (0, 2, 4, 6)]
    if 2 not in fields:
        return checkpoints._check_codes(Path("d"), "x", codes)
    with pytest.raises(CheckpointError, match=f"row 1, column {16 + fields.index(2)},"):
        checkpoints._check_codes(Path("d"), "x", codes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"rms_norm": False}, "rms_norm is False, expected True"),
        ({"num_heads": 7}, "num_heads is 7, expected 8"),
        ({"hidden_size": 48}, "num_heads is 8, expected 12"),
        ({"vocab_size": 57}, r"vocab_size is 57, expected 56"),
        ({"num_hidden_layers": 10**12}, "2 layers in the weights, 1000000000000 in config.json"),
        ({"state_size": 10**12}, "d_state is 1000000000000, expected at most 1048576"),
        ({"conv_kernel": 10**12}, "d_conv is 1000000000000"),
        ({"conv_kernel": 5}, r"conv1d.weight is \[\d+, 1, 4\], expected \[\d+, 1, 5\]"),
        ({"n_groups": 3}, "8 heads are not a multiple of ngroups=3"),
        ({"use_bias": 1}, r"ssm_cfg\['bias'\] is 1, expected true or false"),
        ({"use_bias": True}, "missing tensors backbone.layers.0.mixer.in_proj.bias"),
        ({"layer_norm_epsilon": math.nan}, "norm_epsilon is nan"),
        ({"layer_norm_epsilon": 10**400}, "norm_epsilon is 1000"),
        ({"time_step_limit": [1.0]}, "dt_limit"),
        ({"time_step_limit": [0, 10**400]}, "dt_limit"),
        ({"time_step_limit": [0, math.nan]}, "dt_limit"),
        ({"time_step_limit": [1.0, 0.5]}, "dt_limit"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"tie_word_embeddings": False}, "missing tensors lm_head.weight"),
        (
            {"quantization_config": {"quant_method": "bitnet"}},
            "quant_method is 'bitnet', expected 'ternary_ssm'",
        ),
        ({"quantization_config": {"load_in_8bit": True}}, "expected a quant_method"),
        ({"quantization_config": []}, "expected a quant_method"),
        ({"quantization_config": ...}, "unexpected backbone.layers.0.mixer.in_proj.weight_scale"),
    ],
)
def test_config_of_transformers(changes, words, tmp_path):
    make(MAMBA2, TERNARY).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        MambaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_size": 64}, "group_size=64 does not divide in_features=32"),
        ({"group_size": 33}, "group_size is 33, expected a positive multiple of 32"),
        ({"group_size": 10**12}, "group_size=1000000000000 does not divide"),
        ({"group_size": "tensor"}, r"in_proj.weight_scale is \[\d+, 1\], expected \[1, 1\]"),
        ({"scale_dtype": "bfloat16"}, "in_proj.weight_scale is torch.float16, expected torch.bfloat16"),
        ({"embedding": "int8"}, "missing tensors backbone.embeddings.weight_scale"),
        ({"embedding": "ternary"}, r"is \[56, 32\], config.json expects \[56, 8\]"),
        ({"modules": ["in_proj"]}, "unexpected backbone.layers.0.mixer.out_proj.weight_scale"),
        ({"modules": "in_proj"}, "modules is 'in_proj'"),
        ({"bits": 3}, "bits is 3, expected 2"),
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"surprise": 1}, "has no keys .*surprise"),
    ],
)
def test_quantization_config(changes, words, tmp_path):
    make(MAMBA2, TERNARY).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    edit_json(path, quantization_config=json.loads(path.read_text())["quantization_config"] | changes)
    with pytest.raises(CheckpointError, match=words):
        MambaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, "MambaConfig has no keys .*surprise"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3', expected 'Mamba1' or 'Mamba2'"),
        ({"ssm_cfg": {"surprise": 1}}, "ssm_cfg has unknown keys .*surprise"),
        ({"ssm_cfg": []}, r"ssm_cfg is \[\], expected a dict"),
        ({"attn_layer_idx": [1]}, "attention layers are not supported"),
        ({"d_intermediate": 64}, "d_intermediate=64"),
        ({"d_model": "32"}, "d_model is '32', expected a positive integer"),
        ({"vocab_size": 57}, r"is \[56, 32\], config.json expects \[64, 32\]"),
        ({"pad_vocab_size_multiple": 10**12}, "config.json expects"),
        ({"rms_norm": False}, "missing tensors backbone.layers.0.norm.bias"),
    ],
)
def test_config_of_mamba_ssm(changes, words, tmp_path):
    write_mamba_ssm(make(), tmp_path, "pytorch_model.bin", **changes)
    with pytest.raises(CheckpointError, match=words):
        MambaLM.from_pretrained(tmp_path)


# Damage at random

HOSTILE = [
    0,
    -1,
    1,
    2,
    64,
    10**12,
    10**400,
    0.5,
    1e308,
    math.inf,
    math.nan,
    None,
    True,
    False,
    "",
    "x",
    [],
    {},
    [1],
]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """kind -> (directory, the file to damage, its bytes)."""
    one = dataclasses.replace(MAMBA2, n_layer=1)
    cases = {}
    for kind, file in {
        "transformers": "config.json",
        "mamba_ssm": "config.json",
        "safetensors": files.SINGLE,
        "index": files.INDEX,
        "bin": "pytorch_model.bin",
        "old": "pytorch_model.bin",
    }.items():
        directory = tmp_path_factory.mktemp(kind) / kind
        if kind in ("mamba_ssm", "bin", "old"):
            write_mamba_ssm(make(one), directory, "pytorch_model.bin")
        else:
            make(one, TERNARY).save_pretrained(
                directory, max_shard_bytes=SMALL // 4 if kind == "index" else BIG
            )
        cases[kind] = (directory, directory / file, (directory / file).read_bytes())
    return cases


def loads_or_is_refused(directory: Path) -> None:
    try:
        model = MambaLM.from_pretrained(directory)
    except CheckpointError as error:
        assert len(str(error)) > 20
    else:
        assert model(torch.arange(3)[None]).logits.shape[:2] == (1, 3)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "drop"]),
        st.one_of(st.floats(0, 1), st.integers(0, 400)),  # anywhere, or in the header
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def damaged_bytes(good: bytes, edits: list, reach: int) -> bytes:
    """`good` after EDITS; a place that is a share is one of the first `reach` bytes."""
    data = bytearray(good)
    for action, place, content in edits:
        size = min(reach, len(data))
        at = min(int(place * size) if isinstance(place, float) else place, max(len(data) - 1, 0))
        if action == "flip" and data:
            data[at] ^= content[0] or 1
        elif action == "cut":
            del data[at:]
        elif action == "insert":
            data[at:at] = content
        elif action == "drop":
            del data[at : at + len(content)]
    return bytes(data)


@pytest.mark.parametrize("kind", ["transformers", "mamba_ssm", "safetensors", "index", "bin", "old"])
def test_damaged_bytes(kind, damaged):
    directory, path, good = damaged[kind]

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(EDITS)
    def check(edits):
        path.unlink()  # never over a file that is mapped
        path.write_bytes(damaged_bytes(good, edits, len(good)))
        loads_or_is_refused(directory)

    try:
        check()
    finally:
        path.write_bytes(good)
    loads_or_is_refused(directory)


@pytest.mark.parametrize("kind", ["transformers", "mamba_ssm"])
def test_hostile_config_values(kind, damaged):
    directory, path, good = damaged[kind]
    values = json.loads(good)
    places = [(key,) for key in values]
    places += [(k, inner) for k, v in values.items() if isinstance(v, dict) for inner in [*v, "new"]]
    if kind == "mamba_ssm":
        places += [
            ("ssm_cfg", key) for key in ("d_state", "d_conv", "expand", "ngroups", "norm_groups", "dt_limit")
        ]

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(st.tuples(st.sampled_from(places), st.sampled_from(HOSTILE)), min_size=1, max_size=2))
    def check(changes):
        changed = json.loads(good)
        for place, value in changes:
            parent = changed
            for key in place[:-1]:
                parent = parent[key] if isinstance(parent.get(key), dict) else {}
            parent[place[-1]] = copy.deepcopy(value)
        path.write_text(json.dumps(changed))
        loads_or_is_refused(directory)

    try:
        check()
    finally:
        path.write_bytes(good)
