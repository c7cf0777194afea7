"""What a model is (MambaConfig) and how it is quantized (TernaryConfig)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

# Defaults of mamba_ssm's two mixers for the keys of ssm_cfg (mamba_ssm.modules.mamba_simple and mamba2).
_MAMBA1 = {
    "d_state": 16,
    "d_conv": 4,
    "expand": 2,
    "dt_rank": "auto",
    "conv_bias": True,
    "bias": False,
}
_MAMBA2 = {
    "d_state": 128,
    "d_conv": 4,
    "expand": 2,
    "headdim": 64,
    "ngroups": 1,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "dt_limit": (0.0, math.inf),
    "bias": False,
    "conv_bias": True,
    "chunk_size": 256,
    "norm_groups": None,  # groups of the gated norm, ngroups by default
}
# Keys that shape only the initialisation of a new model, or how mamba_ssm runs it.
_IGNORED = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"}
_IGNORED |= {"use_fast_path", "use_mem_eff_path", "device", "dtype"}


@dataclass(frozen=True)
class MambaConfig:
    """Shape of a Mamba-1 or Mamba-2 language model, in mamba_ssm's field names (Mamba-2 by default).

    Fields that mamba_ssm does not have stand last. Raises ValueError on sizes that do not fit together and on
    what this package does not run (attention or MLP layers).
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=lambda: {"layer": "Mamba2"})
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
            _positive(name, getattr(self, name))
        if self.d_intermediate or self.attn_layer_idx:
            raise ValueError(
                f"d_intermediate={self.d_intermediate}, attn_layer_idx={self.attn_layer_idx}: "
                "models with MLP or attention layers are not supported, expected 0 and []"
            )
        for name in ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings"):
            _boolean(name, getattr(self, name))
        _number("norm_epsilon", self.norm_epsilon)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for token in ids if isinstance(ids, list | tuple) and name == "eos_token_id" else [ids]:
                if token is not None and type(token) is not int:
                    raise ValueError(f"{name} is {ids!r}, expected a token id or none")
        if not isinstance(self.ssm_cfg, dict):
            raise ValueError(f"ssm_cfg is {self.ssm_cfg!r}, expected a dict")
        cfg = {"layer": "Mamba2"} | self.ssm_cfg
        object.__setattr__(self, "ssm_cfg", cfg)
        if cfg["layer"] not in ("Mamba1", "Mamba2"):
            raise ValueError(f"ssm_cfg['layer'] is {cfg['layer']!r}, expected 'Mamba1' or 'Mamba2'")
        if unknown := cfg.keys() - self._mixer_defaults.keys() - _IGNORED - {"layer"}:
            raise ValueError(
                f"ssm_cfg has unknown keys {sorted(unknown)}, expected some of {sorted(self._mixer_defaults)}"
            )
        for name, default in self._mixer_defaults.items():
            if isinstance(default, bool):
                _boolean(f"ssm_cfg[{name!r}]", self[name])
            elif name != "dt_limit" and (isinstance(default, int) or self[name] != default):
                _positive(f"ssm_cfg[{name!r}]", self[name])
        if self.d_inner != self.d_model * self["expand"]:
            raise ValueError(f"expand={self['expand']} times d_model={self.d_model} is not a whole number")
        if self.is_mamba2:
            _limits(self["dt_limit"])
            if self.d_inner % self.headdim:
                raise ValueError(f"d_inner={self.d_inner} is not a multiple of headdim={self.headdim}")
            if self.nheads % self.ngroups:
                raise ValueError(f"{self.nheads} heads are not a multiple of ngroups={self.ngroups}")
            if self.d_inner % self.norm_groups:
                raise ValueError(f"d_inner={self.d_inner}: not a multiple of norm_groups={self.norm_groups}")

    @property
    def _mixer_defaults(self) -> dict[str, Any]:
        return _MAMBA2 if self.ssm_cfg["layer"] == "Mamba2" else _MAMBA1

    def __getitem__(self, name: str) -> Any:
        """A key of ssm_cfg, or its default."""
        return self.ssm_cfg.get(name, self._mixer_defaults[name])

    @property
    def is_mamba2(self) -> bool:
        return self.ssm_cfg["layer"] == "Mamba2"

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text; the first is the one to write."""
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to pad_vocab_size_multiple."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def d_inner(self) -> int:
        return int(self["expand"] * self.d_model)

    @property
    def d_state(self) -> int:
        return self["d_state"]

    @property
    def d_conv(self) -> int:
        return self["d_conv"]

    @property
    def dt_rank(self) -> int:
        """Mamba-1: width of the low-rank step-size projection."""
        rank = self["dt_rank"]
        return -(-self.d_model // 16) if rank == "auto" else rank

    @property
    def headdim(self) -> int:
        return self["headdim"]

    @property
    def ngroups(self) -> int:
        return self["ngroups"]

    @property
    def norm_groups(self) -> int:
        return self["norm_groups"] or self.ngroups

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def dt_limit(self) -> tuple[float, float | None]:
        """Smallest and largest step size; None for no largest."""
        low, high = self["dt_limit"]
        return float(low), None if high is None or math.isinf(high) else float(high)

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x in Mamba-1, x, B and C in Mamba-2."""
        return self.d_inner + (2 * self.ngroups * self.d_state if self.is_mamba2 else 0)

    @property
    def in_proj_rows(self) -> int:
        """Rows of in_proj: [x, z] in Mamba-1, [z, x, B, C, dt] in Mamba-2."""
        return self.d_inner + self.conv_channels + (self.nheads if self.is_mamba2 else 0)

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """Shape of one layer's recurrent state."""
        if self.is_mamba2:
            return batch, self.nheads, self.headdim, self.d_state
        return batch, self.d_inner, self.d_state

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MambaConfig:
        return _from_dict(cls, values)


@dataclass(frozen=True)
class TernaryConfig:
    """How weights become ternary.

    group_size: consecutive weights along the input dimension that share a scale: a multiple of 32, "row" (one
        scale a row) or "tensor" (one a tensor).
    rule: "absmean": scale = mean |w| of the group, code = round(clip(w / scale, -1, 1)) (arXiv 2402.17764,
        2606.18114). "twn": code 0 up to 0.7 mean |w|, scale = mean |w| of the rest (arXiv 1605.04711). "mse":
        the codes and scale of least squared error. "binary": the sign, scale = mean |w|. "learned",
        "bounded": as absmean with a trained scale, or absmean times a trained factor between 0 and 2.
        "shifted": the sign times a trained scale plus a trained shift, one each a column; in training alone.
    scale_dtype: "float16", "bfloat16" or "float32", in training, in files and in memory.
    modules: the Linear layers that become ternary, by last name ("in_proj") or in full.
    embedding: "float" leaves embedding and head as they are; "int8" stores them with one scale a row;
        "ternary" rounds them as the layers, in training too. Of a MambaLM only.
    """

    group_size: int | Literal["row", "tensor"] = 128
    rule: str = "absmean"
    scale_dtype: str = "float16"
    modules: tuple[str, ...] = ("in_proj", "out_proj")
    embedding: Literal["float", "int8", "ternary"] = "float"

    def __post_init__(self) -> None:
        g = self.group_size
        if g not in ("row", "tensor") and (not isinstance(g, int) or isinstance(g, bool) or g <= 0 or g % 32):
            raise ValueError(f"group_size is {g!r}, expected a positive multiple of 32, 'row' or 'tensor'")
        _one_of("rule", self.rule, ("absmean", "twn", "mse", "binary", "learned", "bounded", "shifted"))
        _one_of("scale_dtype", self.scale_dtype, ("float16", "bfloat16", "float32"))
        _one_of("embedding", self.embedding, ("float", "int8", "ternary"))
        names = self.modules
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"modules is {names!r}, expected names of Linear layers")
        object.__setattr__(self, "modules", tuple(names))

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return getattr(torch, self.scale_dtype)

    @property
    def trains_scales(self) -> bool:
        """Whether scales come from parameters of the training, not from the weights alone."""
        return self.rule in ("learned", "bounded", "shifted")

    @property
    def packs(self) -> bool:
        """Whether codes and scales hold what training sees."""
        return self.rule != "shifted"

    def selects(self, name: str) -> bool:
        """Whether the Linear layer of this full name becomes ternary."""
        return name in self.modules or name.rpartition(".")[2] in self.modules

    def group_of(self, in_features: int) -> int:
        """Weights a scale in a row of `in_features`, 0 for one scale a tensor: the operators' group_size.

        The one rule for sizes that do not fit: they are refused (ValueError), never padded.
        """
        if in_features % 4:
            raise ValueError(f"in_features={in_features} is not a multiple of 4, the codes in a byte")
        if self.group_size == "tensor":
            return 0
        group = in_features if self.group_size == "row" else self.group_size
        if in_features % group:
            raise ValueError(f"group_size={group} does not divide in_features={in_features}")
        return group

    def scales_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        group = self.group_of(in_features)
        return (out_features, in_features // group) if group else (1, 1)

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of a config.json."""
        values = dataclasses.asdict(self) | {"modules": list(self.modules)}
        return {"quant_method": "ternary_ssm", "bits": 2, "format_version": 1} | values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TernaryConfig:
        values = dict(values)
        for name, expected in (("quant_method", "ternary_ssm"), ("bits", 2), ("format_version", 1)):
            if (found := values.pop(name, expected)) != expected:
                raise ValueError(f"quantization_config: {name} is {found!r}, expected {expected!r}")
        return _from_dict(cls, values)


def _from_dict(cls, values: dict[str, Any]):
    names = [f.name for f in dataclasses.fields(cls)]
    if unknown := values.keys() - set(names):
        raise ValueError(f"{cls.__name__} has no keys {sorted(unknown)}, expected some of {names}")
    return cls(**values)


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected true or false")


def _number(name: str, value: Any) -> None:
    largest = torch.finfo(torch.float32).max
    if type(value) not in (int, float) or not 0 <= value <= largest:
        raise ValueError(f"{name} is {value!r}, expected a number from 0 to {largest:.3g}")


def _limits(value: Any) -> None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"ssm_cfg['dt_limit'] is {value!r}, expected the smallest and the largest step size")
    low, high = value
    _number("ssm_cfg['dt_limit'][0]", low)
    if high is not None and high != math.inf:
        _number("ssm_cfg['dt_limit'][1]", high)
        if high < low:
            raise ValueError(f"ssm_cfg['dt_limit'] is {value!r}, expected the smaller step size first")


def _one_of(name: str, value: Any, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(expected)}")
