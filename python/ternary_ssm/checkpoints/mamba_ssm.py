"""Directories of mamba_ssm: MambaConfig is its config.json. One of its tensor names is not ours."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import MambaConfig

EMBEDDING = "backbone.embedding"  # ours: backbone.embeddings

# Notes of other programs, which say nothing of the model.
_IGNORED = {
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
}
# Written only where they say something, since mamba_ssm does not know them.
_OWN = {"norm_epsilon", "bos_token_id", "eos_token_id", "pad_token_id"}


def matches(values: dict[str, Any]) -> bool:
    return "d_model" in values


def read(values: dict[str, Any]) -> MambaConfig:
    """ValueError on keys that are unknown or that this package cannot run."""
    values = {"ssm_cfg": {}} | {key: value for key, value in values.items() if key not in _IGNORED}
    if isinstance(values["ssm_cfg"], dict):
        values["ssm_cfg"] = {"layer": "Mamba1"} | values["ssm_cfg"]  # its default; MambaConfig's is Mamba2
    return MambaConfig.from_dict(values)


def write(config: MambaConfig) -> dict[str, Any]:
    default = {field.name: field.default for field in dataclasses.fields(config)}
    values = config.to_dict()
    return {key: value for key, value in values.items() if key not in _OWN or value != default[key]}
