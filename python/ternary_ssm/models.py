"""MambaLM: Mamba-1 and Mamba-2 language models, dense or ternary, and the cache they decode with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import checkpoints, generation, training
from .config import MambaConfig, TernaryConfig
from .layers import Int8Table, Mamba, Mamba2, PackedTable, TernaryMamba, TernaryMamba2, TernaryTable


@dataclass
class MambaCache:
    """The states of a batch of sequences: all that decoding needs of the past. Updated in place.

    conv: [n_layer, b, d_conv - 1, conv_channels]; ssm: [n_layer, *config.state_shape(b)].
    """

    conv: Tensor
    ssm: Tensor

    @classmethod
    def empty(
        cls,
        config: MambaConfig,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
    ) -> MambaCache:
        """States of sequences not begun; `dtype` is the activations', `state_dtype` the recurrence's."""
        conv = (config.n_layer, batch, config.d_conv - 1, config.conv_channels)
        return cls(
            torch.zeros(conv, device=device, dtype=dtype),
            torch.zeros(config.n_layer, *config.state_shape(batch), device=device, dtype=state_dtype),
        )


@dataclass
class MambaOutput:
    logits: Tensor  # [b, l, padded_vocab_size], or [b or q, 1, ...] with last_only
    cache: MambaCache | None


class Block(nn.Module):
    """x + mixer(norm(x)), the sum in fp32 if config.residual_in_fp32."""

    def __init__(self, config: MambaConfig, ternary: TernaryConfig | None, name: str, device, dtype) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = _norm(config, device, dtype)
        dense, packed = (Mamba2, TernaryMamba2) if config.is_mamba2 else (Mamba, TernaryMamba)
        self.mixer = (dense if ternary is None else packed)(config, ternary, f"{name}.mixer", device, dtype)

    def forward(self, x: Tensor, *states: Tensor | None, form: Callable[..., Any] | None = None) -> Any:
        """form: computes form(block, x, *states) instead; in a call, where FSDP has the parameters whole."""
        if form is not None:
            return form(self, x, *states)
        residual = x.float() if self.residual_in_fp32 else x
        return residual + self.mixer(self.norm(x.to(self.norm.weight.dtype)), *states)


class Backbone(nn.Module):
    """Embedding, blocks and the last norm."""

    # Of the blocks, in training: the share that backward computes again, as far as that pays (training.py).
    recompute: float = 0.0

    def __init__(self, config: MambaConfig, ternary: TernaryConfig | None, device, dtype) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _table(config, ternary, nn.Embedding, device, dtype)
        self.layers = nn.ModuleList(
            Block(config, ternary, f"backbone.layers.{i}", device, dtype) for i in range(config.n_layer)
        )
        self.norm_f = _norm(config, device, dtype)

    def forward(
        self, ids: Tensor, cache: MambaCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """ids [b, l] -> hidden states [b, l, d_model]."""
        dtype = self.norm_f.weight.dtype
        if (
            torch.is_grad_enabled()
            and cache is None
            and cu_seqlens is None
            and isinstance(self.embeddings, nn.Embedding)
        ):
            return training.run(self, ids)
        x = self.embeddings(ids, dtype) if isinstance(self.embeddings, PackedTable) else self.embeddings(ids)
        for i, block in enumerate(self.layers):
            states = (None, None) if cache is None else (cache.conv[i], cache.ssm[i])
            x = block(x, *states, cu_seqlens)
        return self.norm_f(x.to(dtype))


class MambaLM(nn.Module):
    """A Mamba language model.

    `MambaLM(config)` has random weights; `MambaLM(config, ternary)` has packed, empty ones to load into.
    `quantize_` and `pack_` of ternary_ssm.surgery turn a dense model into a ternary one.
    """

    source: Path | None = None  # the directory that it was loaded from

    def __init__(
        self,
        config: MambaConfig,
        ternary: TernaryConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.ternary = config, ternary
        self.backbone = Backbone(config, ternary, device, dtype)
        self.lm_head = None if config.tie_embeddings else _table(config, ternary, _head, device, dtype)
        self._initialize()

    @property
    def device(self) -> torch.device:
        return self.backbone.norm_f.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the activations."""
        return self.backbone.norm_f.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        cache: MambaCache | None = None,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
    ) -> MambaOutput:
        """input_ids [b, l] -> logits [b, l, v].

        cache: states to go on from, updated in place.
        cu_seqlens: int32 [q + 1]; input_ids is then [1, l], q sequences end to end; the cache has q rows.
        last_only: the logits of each sequence's last token alone.
        Raises ValueError on token ids outside the vocabulary (checked on the CPU only).
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch, length], not {list(input_ids.shape)}")
        rows = self.config.padded_vocab_size
        if input_ids.device.type == "cpu" and input_ids.numel():
            low, high = input_ids.min().item(), input_ids.max().item()
            if low < 0 or high >= rows:
                raise ValueError(f"token ids from {low} to {high}, expected 0 to {rows - 1}")
        hidden = self.backbone(input_ids, cache, cu_seqlens)
        if last_only:
            last = slice(-1, None) if cu_seqlens is None else cu_seqlens[1:].long() - 1
            hidden = hidden[:, last] if cu_seqlens is None else hidden[0, last].unsqueeze(1)
        return MambaOutput(self.logits(hidden), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d_model] -> [..., padded_vocab_size]."""
        head = self.head
        return head.logits(hidden) if isinstance(head, PackedTable) else F.linear(hidden, head.weight)

    @property
    def head(self) -> nn.Module:
        """What has the head's table as its `weight`."""
        return self.backbone.embeddings if self.lm_head is None else self.lm_head

    def empty_cache(self, batch: int, state_dtype: torch.dtype = torch.float32) -> MambaCache:
        return MambaCache.empty(self.config, batch, self.device, self.dtype, state_dtype)

    def _apply(self, fn, recurse=True):
        generation.release(self)
        return super()._apply(fn, recurse)

    def generate(
        self, input_ids: generation.Prompts, max_new_tokens: int, **sampling: Any
    ) -> generation.Prompts:
        """Continues each prompt; see generation.generate, and SamplingConfig for `sampling`."""
        return generation.generate(self, input_ids, max_new_tokens, **sampling)

    def _initialize(self) -> None:
        """As mamba_ssm does: embeddings N(0, 0.02), out_proj shrunk by the square root of the depth."""
        with torch.no_grad():
            if isinstance(self.backbone.embeddings, nn.Embedding):
                nn.init.normal_(self.backbone.embeddings.weight, std=0.02)
            for block in self.backbone.layers:
                if isinstance(block.mixer.out_proj, nn.Linear):
                    block.mixer.out_proj.weight /= self.config.n_layer**0.5
                for linear in (block.mixer.in_proj, block.mixer.out_proj):
                    if linear.bias is not None:
                        nn.init.zeros_(linear.bias)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> MambaLM:
        """Loads a directory of transformers (Mamba, Mamba-2), mamba_ssm or this package, or a .gguf file.

        dtype: of the activations and the dense weights; as stored by default.
        Raises CheckpointError, which names the file or tensor, what was expected and what was found.
        """
        checkpoint = checkpoints.load(directory)
        with checkpoints.reading(checkpoint.settings), _Unfilled():  # sizes that do not fit together
            model = cls(checkpoint.config, checkpoint.ternary, "meta", dtype or checkpoint.dtype)
        checkpoints.assign(model, checkpoint, device)
        model.source = checkpoint.directory
        return model.eval()

    def save_pretrained(
        self,
        directory: str | Path,
        copy_from: str | Path | None = None,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        """Writes config.json and safetensors, in transformers' layout where it can describe the model.

        copy_from: a directory whose tokenizer files come along; by default the one that the model was loaded
        from. Raises CheckpointError on a model under quantization-aware training.
        """
        source = self.source if copy_from is None else Path(copy_from)
        checkpoints.save(directory, self.config, self.ternary, self.state_dict(), source, max_shard_bytes)


class _Unfilled(TorchFunctionMode):
    """Computes no initial values: on `meta` torch would import its compiler for that, which takes 1 s."""

    same_shape = frozenset("uniform_ kaiming_uniform_ normal_ log exp expm1 neg add div_".split())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.same_shape:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _norm(config: MambaConfig, device, dtype) -> nn.Module:
    norm = nn.RMSNorm if config.rms_norm else nn.LayerNorm
    return norm(config.d_model, eps=config.norm_epsilon, device=device, dtype=dtype)


def _table(config: MambaConfig, ternary: TernaryConfig | None, dense, device, dtype) -> nn.Module:
    rows, dim = config.padded_vocab_size, config.d_model
    if ternary is not None and ternary.embedding == "int8":
        return Int8Table(rows, dim, ternary.torch_scale_dtype, device)
    if ternary is not None and ternary.embedding == "ternary":
        return TernaryTable(rows, dim, ternary, device)
    return dense(rows, dim, device=device, dtype=dtype)


def _head(rows: int, dim: int, device, dtype) -> nn.Linear:
    return nn.Linear(dim, rows, bias=False, device=device, dtype=dtype)
