"""Decoder: all layers of a Mamba-2 model by one operator, on weights stacked by kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import _C
from .layers import Int8Table, PackedTable, TernaryLinear, TernaryTable
from .ops import has_kernel

if TYPE_CHECKING:
    from .config import MambaConfig
    from .models import MambaCache, MambaLM

# The operator's name of a kind of weight -> where it lies in a block.
_KINDS = {
    "norm": "norm.weight",
    "in_codes": "mixer.in_proj.weight",
    "in_scales": "mixer.in_proj.weight_scale",
    "conv_weight": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias",
    "dt_bias": "mixer.dt_bias",
    "A_log": "mixer.A_log",
    "D": "mixer.D",
    "gate_norm": "mixer.norm.weight",
    "out_codes": "mixer.out_proj.weight",
    "out_scales": "mixer.out_proj.weight_scale",
}
_LISTED = ("in_codes", "in_scales", "out_codes", "out_scales")  # the operator takes one tensor a layer
_CAST = ("norm", "conv_weight", "conv_bias", "gate_norm")  # kinds of the activations' dtype


def decode_workspace(config: MambaConfig, batch: int, device: torch.device | str) -> Tensor:
    """What the persistent CUDA kernel keeps between calls, zero at the start; nothing elsewhere.

    Eight regions of fp32 words that its blocks exchange, and four words before: csrc/kernels/sm90/decode.
    """
    words = config.d_model + 2 * config.d_state + 2 * config.nheads + config.d_inner
    persistent = torch.device(device).type == "cuda" and batch <= _C.persistent_batch
    size = 4 + 8 * batch * words if persistent else 0
    return torch.zeros(size, dtype=torch.int32, device=device)


class Decoder:
    """decoder(tokens [b], cache) -> the residual stream behind the last layer, fp32 [b, d_model].

    The layers' tensors become views of one stack a kind, so that no second copy stays in memory. On a CPU the
    projections stay where they are, perhaps in a mapped file.
    """

    def __init__(self, model: MambaLM) -> None:
        self.config, self.backbone = model.config, model.backbone
        self.stacks: dict[str, Tensor] = {}
        self.lists: dict[str, list[Tensor]] = {}  # of _LISTED
        self.workspaces: dict[int, Tensor] = {}  # by batch
        self._stack()

    @staticmethod
    def supports(model: MambaLM, batch: int) -> bool:
        """Whether the operator's kernel runs this model, as it stands, on so many rows."""
        c, ternary = model.config, model.ternary
        if not c.is_mamba2 or ternary is None or batch < 1:
            return False
        shape = (c.rms_norm, c.residual_in_fp32, c.ngroups, c.norm_groups, c.d_conv)
        options = (c["rmsnorm"], c["norm_before_gate"], c["D_has_hdim"], c["bias"])
        blocks = model.backbone.layers
        on_cpu = model.device.type == "cpu"  # where the kernel takes fp32 too
        return (
            shape == (True, True, 1, 1, 4)
            and options == (True, False, False, False)
            and (on_cpu or (model.dtype.itemsize == 2 and c.d_model % 8 == 0))
            and all(
                isinstance(linear, TernaryLinear)
                for b in blocks
                for linear in (b.mixer.in_proj, b.mixer.out_proj)
            )
            and (not on_cpu or _same_activations(blocks))
            and all(_alike([_find(b, path) for b in blocks]) for path in _KINDS.values())
            and _types_fit(model)
        )

    def refresh(self) -> None:
        """To be called when the model may have changed since: stacks anew tensors that were replaced."""
        if not self.watch.unchanged():
            self._stack()
        self.update()

    def update(self) -> None:
        """To be called when values may have changed in place."""
        with torch.no_grad():
            self.A.copy_(-torch.exp(self.stacks["A_log"]))  # at once: another thread may be decoding

    def __call__(self, tokens: Tensor, cache: MambaCache) -> Tensor:
        """Updates the cache in place."""
        if len(tokens) not in self.workspaces:
            with torch.inference_mode(False):  # of use in either mode, as A is
                workspace = decode_workspace(self.config, len(tokens), tokens.device)
                self.workspaces[len(tokens)] = workspace
        ids, *table = self._table(tokens)
        weights, workspace = (*table, *self._weights(cache)), self.workspaces[len(tokens)]
        # A GPU's kernel does not round the activations of a token.
        activations = self.activations if tokens.device.type == "cpu" else "a16"
        return torch.ops.ternary.decode(ids, *weights, workspace, *self._options, activations)

    def prefill(self, ids: Tensor, cache: MambaCache, cu_seqlens: Tensor | None = None) -> Tensor:
        """Sequences [b, l], or those of cu_seqlens, from their beginning: the residual stream [b, l, d].

        Overwrites the cache.
        """
        ids, *table = self._table(ids)
        weights = (*table, *self._weights(cache))
        return torch.ops.ternary.prefill(ids, cu_seqlens, *weights, *self._options, self.activations)

    @property
    def prefills(self) -> bool:
        """Whether `prefill` has a kernel for the model as it stands."""
        device = self.backbone.norm_f.weight.device.type
        return has_kernel("prefill", device) and _same_activations(self.backbone.layers)

    @property
    def activations(self) -> str:
        return self.backbone.layers[0].mixer.in_proj.activations

    @property
    def _options(self) -> tuple[float, float, float | None]:
        return self.config.norm_epsilon, *self.config.dt_limit

    def _table(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(tokens, table, its scales) for the operators, to which a ternary table is the tokens' own rows."""
        table = self.backbone.embeddings
        if isinstance(table, TernaryTable):
            rows = table(tokens.flatten(), self.backbone.norm_f.weight.dtype)
            return torch.arange(len(rows), device=rows.device).view(tokens.shape), rows, None
        return tokens, table.weight.detach(), table.weight_scale if isinstance(table, PackedTable) else None

    def _weights(self, cache: MambaCache) -> tuple[Tensor | None, ...]:
        """What both operators take."""
        s, listed = self.stacks, self.lists
        return (
            *(s["norm"], listed["in_codes"], listed["in_scales"]),
            *(s["conv_weight"].squeeze(2), s.get("conv_bias"), cache.conv, s["dt_bias"], self.A, s["D"]),
            *(cache.ssm, s["gate_norm"], listed["out_codes"], listed["out_scales"]),
        )

    def _stack(self) -> None:
        self.stacks.clear()
        in_place = _LISTED if self.backbone.norm_f.weight.is_cpu else ()
        for kind in in_place:
            self.lists[kind] = [_find(block, _KINDS[kind]) for block in self.backbone.layers]
        for kind, path in _KINDS.items():
            if kind not in in_place and (stack := _stack(self.backbone.layers, path)) is not None:
                self.stacks[kind] = stack
        self.lists |= {kind: [*stack] for kind, stack in self.stacks.items() if kind in _LISTED}
        with torch.inference_mode(False):
            self.A = torch.empty_like(self.stacks["A_log"])
        self.watch = Watch(self.backbone.layers)
        self.update()


def next_logits(model: MambaLM, decoder: Decoder | None, tokens: Tensor, cache: MambaCache) -> Tensor:
    """The logits [b, v] behind one more token of each sequence; without a Decoder by the layers."""
    if decoder is None:
        return model(tokens.unsqueeze(1), cache).logits[:, 0]
    return last_logits(model, decoder(tokens, cache))


def last_logits(model: MambaLM, hidden: Tensor) -> Tensor:
    """The last norm and the head of what a Decoder gives: [b, d] -> [b, v]."""
    norm, table = model.backbone.norm_f, model.head
    tokens, dim = hidden.shape
    int8 = isinstance(table, Int8Table)
    # The operator's kernel reads the table once for each eight tokens.
    most = 0 if not hidden.is_cuda or isinstance(table, TernaryTable) else 64 if int8 else 8
    if tokens <= most and dim % 32 == 0 and dim <= 4416:
        scale = table.weight_scale if int8 else None
        return torch.ops.ternary.head(hidden, norm.weight.detach(), table.weight.detach(), scale, norm.eps)
    return model.logits(norm(hidden.to(model.dtype)))


class Watch:
    """Tells whether a module's tensors or parts were replaced since; changes in place do not matter."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [(m._modules, dict(m._modules)) for m in module.modules()]
        self.tensors = [(owner, dict(_places(owner))) for m in module.modules() for owner in _owners(m)]

    def unchanged(self) -> bool:
        return all(now == then for now, then in self.parts) and all(
            dict(_places(owner)) == then for owner, then in self.tensors
        )


def _owners(module: nn.Module) -> list[dict[str, Tensor | None]]:
    return [owner for owner in (module._parameters, module._buffers) if owner]


def _places(owner: dict[str, Tensor | None]) -> Iterator[tuple[str, tuple]]:
    return ((name, (t.data_ptr(), t.dtype)) for name, t in owner.items() if t is not None)


def _find(block: nn.Module, path: str) -> Tensor | None:
    value = block
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _types_fit(model: MambaLM) -> bool:
    """Whether the tensors have the dtypes that the operator takes together."""
    block, table = model.backbone.layers[0], model.backbone.embeddings
    found = [_find(block, _KINDS[kind]) for kind in _CAST]
    scales = [_find(block, _KINDS[kind]) for kind in ("in_scales", "out_scales")]
    if isinstance(table, PackedTable):
        scales.append(table.weight_scale)
    else:
        found.append(table.weight)
    return {t.dtype for t in found if t is not None} == {model.dtype} and len({t.dtype for t in scales}) == 1


def _same_activations(blocks: nn.ModuleList) -> bool:
    return len({linear.activations for b in blocks for linear in (b.mixer.in_proj, b.mixer.out_proj)}) == 1


def _alike(tensors: list[Tensor | None]) -> bool:
    """Whether the tensors can be stacked."""
    return len({t is None or (t.shape, t.dtype, t.device) for t in tensors}) == 1


def _stack(blocks: nn.ModuleList, path: str) -> Tensor | None:
    """[L, ...] of one kind of weight, whose slices become the blocks' own tensors."""
    module_path, _, name = path.rpartition(".")
    tensors = [_find(block, path) for block in blocks]
    if tensors[0] is None:
        return None
    # What was no inference tensor is none afterwards: the model may be trained.
    with torch.inference_mode(tensors[0].is_inference()), torch.no_grad():
        stack = torch.stack([t.detach() for t in tensors])
        for block, tensor, view in zip(blocks, tensors, stack, strict=True):
            if isinstance(tensor, nn.Parameter):
                tensor.data = view
            else:
                block.get_submodule(module_path).register_buffer(name, view)
    return stack
