"""Our mixers behind the interfaces of transformers' and mamba_ssm's, with their parameters and their caches.

Both keep the last d_conv inputs of the convolution, [b, c, d_conv]; ours the d_conv - 1 that a step needs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import mamba_ssm, transformers
from .config import MambaConfig
from .layers import Mamba, Mamba2

_SHARED = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


def config_of(model: nn.Module) -> MambaConfig:
    """The shape of a model of either library. ValueError on what this package does not run."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        return transformers.read(config.to_dict())
    if dataclasses.is_dataclass(config):
        return mamba_ssm.read(dataclasses.asdict(config))
    raise ValueError(f"{type(model).__name__}.config is {config!r}, expected transformers' or mamba_ssm's")


class _Hosted:
    """A mixer that took over the parameters of another library's."""

    layer_idx: int

    @classmethod
    def adopt(cls, host: nn.Module, config: MambaConfig) -> nn.Module:
        mixer = cls(config, device="meta").train(host.training)
        for name in _SHARED:
            if hasattr(mixer, name):
                setattr(mixer, name, getattr(host, name))
        for name in cls.dynamics:
            parameter = getattr(host, name)
            parameter.data = parameter.data.float()
            setattr(mixer, name, parameter)
        if isinstance(mixer, Mamba2) and mixer.norm is not None:
            mixer.norm.weight = host.norm.weight
        mixer.layer_idx = host.layer_idx
        return mixer

    def _new_states(self, batch: int, dtype: torch.dtype, state_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of the host's shape: conv [b, c, d_conv], ssm."""
        c, device = self.config, self.conv1d.weight.device
        conv = torch.zeros(batch, c.conv_channels, c.d_conv, dtype=dtype, device=device)
        return conv, torch.zeros(c.state_shape(batch), dtype=state_dtype, device=device)

    def _ours(self, conv: Tensor) -> Tensor:
        """The host's convolution state as ours, [b, d_conv - 1, c]."""
        return conv[..., -(self.config.d_conv - 1) :].transpose(1, 2).contiguous()


class _TransformersMixer(_Hosted):
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        u, layer = hidden_states, self.layer_idx
        if attention_mask is not None:
            u = u * attention_mask.unsqueeze(-1).to(u.dtype)
        if cache_params is None:
            return super().forward(u, mask=attention_mask)
        host_conv, ssm = cache_params.get_conv_state(layer), cache_params.get_recurrent_state(layer)
        begins = host_conv is None
        if begins:
            host_conv, ssm = self._new_states(len(u), u.dtype, torch.float32)
        conv = self._ours(host_conv)
        y = super().forward(u, conv, ssm, mask=attention_mask)
        cache_params.update_conv_state(conv.transpose(1, 2), layer, conv_kernel_size=self.config.d_conv)
        if begins:  # later on the state is the cache's own, and updated in place
            cache_params.update_recurrent_state(ssm, layer)
        return y


class _MambaSsmMixer(_Hosted):
    def forward(
        self, u: Tensor, cu_seqlens: Tensor | None = None, inference_params: Any = None, **kwargs: Any
    ) -> Tensor:
        if unknown := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(
                f"the mixer was given {', '.join(unknown)}, expected cu_seqlens for packed sequences"
            )
        if inference_params is None:
            return super().forward(u, cu_seqlens=cu_seqlens)
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            batch = len(u) if cu_seqlens is None else len(cu_seqlens) - 1
            states[self.layer_idx] = self.allocate_inference_cache(batch, inference_params.max_seqlen)
        host_conv, ssm = states[self.layer_idx]
        if inference_params.seqlen_offset == 0:
            host_conv.zero_()
            ssm.zero_()
        else:
            cu_seqlens = None  # a step of each sequence
        conv = self._ours(host_conv)
        y = super().forward(u, conv, ssm, cu_seqlens)
        host_conv[..., 1:].copy_(conv.transpose(1, 2))  # in place: a CUDA graph may replay it
        return y

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        dtype = dtype or self.conv1d.weight.dtype
        return self._new_states(batch_size, dtype, dtype)


class TransformersMamba(_TransformersMixer, Mamba):
    """For transformers.models.mamba.MambaMixer."""


class TransformersMamba2(_TransformersMixer, Mamba2):
    """For transformers.models.mamba2.Mamba2Mixer."""


class MambaSsmMamba(_MambaSsmMixer, Mamba):
    """For mamba_ssm.modules.mamba_simple.Mamba."""


class MambaSsmMamba2(_MambaSsmMixer, Mamba2):
    """For mamba_ssm.modules.mamba2.Mamba2."""


MIXERS: dict[tuple[str, str], type[_Hosted]] = {
    ("transformers.models.mamba.modeling_mamba", "MambaMixer"): TransformersMamba,
    ("transformers.models.mamba2.modeling_mamba2", "Mamba2Mixer"): TransformersMamba2,
    ("mamba_ssm.modules.mamba_simple", "Mamba"): MambaSsmMamba,
    ("mamba_ssm.modules.mamba2", "Mamba2"): MambaSsmMamba2,
}
