"""Directories of transformers: MambaForCausalLM and Mamba2ForCausalLM. The tensor names are ours."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import MambaConfig

# Its key -> ours. Those that MambaConfig does not have itself are keys of ssm_cfg.
_COMMON = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "norm_epsilon",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
}
_MAMBA2 = {"head_dim": "headdim", "n_groups": "ngroups", "chunk_size": "chunk_size"}
_KEYS = {
    "mamba": _COMMON | {"time_step_rank": "dt_rank"},
    "mamba2": _COMMON | _MAMBA2 | {"time_step_limit": "dt_limit"},
}
# What a key that config.json leaves out means to transformers, where it is not what it means to mamba_ssm.
_OPTIONAL = ("hidden_size", "num_hidden_layers", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_DEFAULTS = {
    "mamba": dict(zip(_OPTIONAL, (768, 32, 50280, 0, 0, 0), strict=True)),
    "mamba2": dict(zip(_OPTIONAL, (4096, 64, 32768, 0, 2, 1), strict=True))
    | {"tie_word_embeddings": False, "n_groups": 8, "num_heads": 128},
}
_FIELDS = {field.name for field in dataclasses.fields(MambaConfig)}


def matches(values: dict[str, Any]) -> bool:
    return values.get("model_type") in list(_KEYS)


def read(values: dict[str, Any]) -> MambaConfig:
    """ValueError on what transformers can express and this package cannot run."""
    kind = values["model_type"]
    values = _DEFAULTS[kind] | values
    ours = {name: values[key] for key, name in _KEYS[kind].items() if key in values}
    fields = {name: value for name, value in ours.items() if name in _FIELDS}
    mixer = {name: value for name, value in ours.items() if name not in _FIELDS}
    # Its vocab_size counts the rows of the table; ours those that stand for tokens.
    fields["vocab_size"] = values.get("unpadded_vocab_size", values["vocab_size"])
    fields["pad_vocab_size_multiple"] = values.get("pad_vocab_size_multiple", 1)
    config = MambaConfig(ssm_cfg={"layer": "Mamba2" if kind == "mamba2" else "Mamba1"} | mixer, **fields)

    _expect(values, "vocab_size", config.padded_vocab_size)
    _expect(values, "hidden_act", "silu", "swish")
    _expect(values, "rms_norm", True)
    if config.is_mamba2:
        _expect(values, "num_heads", config.nheads)
    else:
        _expect(values, "intermediate_size", config.d_inner)
    return config


def write(config: MambaConfig) -> dict[str, Any] | None:
    """The config.json, or None if transformers has no words for the model."""
    # Its gated norm has n_groups groups, as mamba_ssm's; releases before 5.23 took one.
    if not config.rms_norm or (
        config.is_mamba2
        and (
            not config["rmsnorm"]
            or config["norm_before_gate"]
            or config["D_has_hdim"]
            or config.norm_groups != config.ngroups
        )
    ):
        return None
    kind = "mamba2" if config.is_mamba2 else "mamba"
    values = {"architectures": [f"{kind.title()}ForCausalLM"], "model_type": kind, "hidden_act": "silu"}
    for key, name in _KEYS[kind].items():
        values[key] = getattr(config, name) if name in _FIELDS else config[name]
    values["vocab_size"] = config.padded_vocab_size
    if config.padded_vocab_size != config.vocab_size:
        values["unpadded_vocab_size"] = config.vocab_size
        values["pad_vocab_size_multiple"] = config.pad_vocab_size_multiple
    if config.is_mamba2:
        low, high = config.dt_limit
        values["num_heads"] = config.nheads
        values["time_step_limit"] = [low, {"__float__": "Infinity"} if high is None else high]
    return values


def _expect(values: dict[str, Any], key: str, *expected: Any) -> None:
    if (found := values.get(key, expected[0])) not in expected:
        raise ValueError(f"{key} is {found!r}, expected {' or '.join(map(repr, expected))}")
