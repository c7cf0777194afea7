import json

import pytest

from ternary_ssm import MambaConfig, TernaryConfig


@pytest.mark.parametrize(
    "d_model, rows, heads",
    [(768, 3352, 24), (1024, 4384, 32), (1536, 6448, 48), (2048, 8512, 64), (2560, 10576, 80)],
)
def test_published_mamba2_sizes(d_model, rows, heads):
    config = MambaConfig(d_model=d_model, pad_vocab_size_multiple=16)
    assert (config.in_proj_rows, config.nheads, config.padded_vocab_size) == (rows, heads, 50288)
    assert config.state_shape(3) == (3, heads, 64, 128)


def test_published_mamba1_sizes():
    config = MambaConfig(d_model=2048, n_layer=48, ssm_cfg={"layer": "Mamba1"})
    assert (config.in_proj_rows, config.dt_rank, config.padded_vocab_size) == (8192, 128, 50280)
    assert config.state_shape(1) == (1, 4096, 16)


def test_json_round_trip():
    config = MambaConfig(d_model=64, ssm_cfg={"layer": "Mamba2", "ngroups": 2}, eos_token_id=0)
    assert MambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    ternary = TernaryConfig(group_size="row", modules=("in_proj",), embedding="int8")
    assert TernaryConfig.from_dict(json.loads(json.dumps(ternary.to_dict()))) == ternary


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_model": 0}, "d_model is 0, expected a positive integer"),
        ({"d_model": 2.5}, "d_model is 2.5"),
        ({"d_intermediate": 4}, "d_intermediate=4"),
        ({"attn_layer_idx": [1]}, "attention layers are not supported"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3', expected 'Mamba1' or 'Mamba2'"),
        ({"ssm_cfg": {"d_sate": 64}}, r"unknown keys \['d_sate'\]"),
        ({"d_model": 80, "ssm_cfg": {"headdim": 64}}, "d_inner=160 is not a multiple of headdim=64"),
        ({"d_model": 96, "ssm_cfg": {"ngroups": 2}}, "3 heads are not a multiple of ngroups=2"),
    ],
)
def test_model_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MambaConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_size": 0}, "group_size is 0, expected a positive multiple of 32, 'row' or 'tensor'"),
        ({"group_size": 100}, "group_size is 100"),
        ({"group_size": True}, "group_size is True"),
        (
            {"rule": "median"},
            "rule is 'median', expected one of absmean, twn, mse, binary, learned, bounded,",
        ),
        ({"scale_dtype": "int8"}, "scale_dtype is 'int8'"),
        ({"embedding": "int4"}, "embedding is 'int4', expected one of float, int8, ternary"),
    ],
)
def test_quantizations_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TernaryConfig(**options)


def test_group_sizes():
    assert TernaryConfig(group_size=128).scales_shape(10, 256) == (10, 2)
    assert TernaryConfig(group_size="row").scales_shape(10, 36) == (10, 1)
    assert TernaryConfig(group_size="tensor").scales_shape(10, 36) == (1, 1)
    with pytest.raises(ValueError, match="group_size=128 does not divide in_features=192"):
        TernaryConfig(group_size=128).group_of(192)
    with pytest.raises(ValueError, match="in_features=34 is not a multiple of 4"):
        TernaryConfig(group_size="row").group_of(34)


def test_unknown_keys_of_files_are_refused():
    with pytest.raises(ValueError, match=r"TernaryConfig has no keys \['grup_size'\]"):
        TernaryConfig.from_dict({"grup_size": 128})
    with pytest.raises(ValueError, match="quant_method is 'bitnet', expected 'ternary_ssm'"):
        TernaryConfig.from_dict({"quant_method": "bitnet"})
    with pytest.raises(ValueError, match="format_version is 2, expected 1"):
        TernaryConfig.from_dict({"format_version": 2})
