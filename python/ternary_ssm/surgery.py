"""Model surgery: quantize_ makes a model's projections ternary for training, pack_ for inference;
replace_mixers_ gives the models of other libraries our mixers.

quantize_ works by parametrization of `.weight`, not by other modules: transformers and mamba_ssm read
`in_proj.weight` and `out_proj.weight` raw on their fused paths, and a parametrized weight cannot be bypassed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from torch import nn
from torch.nn.utils import parametrize

from .config import TernaryConfig
from .hosts import MIXERS, config_of
from .layers import Int8Table, TernaryLinear, TernaryTable
from .models import MambaLM
from .quantizer import FakeQuantize

FilterFn = Callable[[nn.Module, str], bool]


def quantize_(model: nn.Module, config: TernaryConfig, filter_fn: FilterFn | None = None) -> nn.Module:
    """Makes Linear layers ternary in place for quantization-aware training; returns the model.

    model: a MambaLM, or a Mamba model of transformers or mamba_ssm.
    filter_fn(module, name): which Linear layers; by default those whose last name is in config.modules.
    Whatever these are, config.embedding "ternary" adds embedding and head; other than "float" it needs a
    MambaLM.
    The latent weights become fp32; `layer.weight` is then code * scale in the layer's dtype, with a
    straight-through gradient (arXiv 2606.18114). Everything else is untouched. Rules that train scales add
    their parameters (quantizer.FakeQuantize) to model.parameters().
    Raises ValueError if nothing matches, a layer is quantized already, or the group size does not divide it.
    """
    wanted = filter_fn or (lambda module, name: config.selects(name))
    chosen = {name: m for name, m in _linears(model) if wanted(m, name)}
    if not chosen:
        raise ValueError(f"no Linear of {type(model).__name__} was chosen, expected names {config.modules}")
    tables = _tables(model, config)
    if config.embedding == "ternary":
        chosen |= tables
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"{name}.weight is parametrized already, expected a plain weight")
        try:
            config.group_of(layer.weight.shape[1])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for layer in chosen.values():
        dtype = layer.weight.dtype
        layer.weight.data = layer.weight.data.float()
        fake = FakeQuantize(config, layer.weight, dtype)
        parametrize.register_parametrization(layer, "weight", fake, unsafe=True)
    return model


def pack_(
    model: nn.Module, config: TernaryConfig | None = None, filter_fn: FilterFn | None = None
) -> nn.Module:
    """Replaces quantized layers by packed ones in place, for inference; returns the model.

    After quantize_ it packs what training saw, under the config given there. A dense model is rounded as it
    stands and needs `config`, of a rule that trains no scales. The embedding and head of a MambaLM become
    int8 or ternary if the config says so. The Mamba-1 of mamba_ssm reads its weights raw and cannot run
    packed ones: replace_mixers_ makes it.
    """
    if quantized := _fake_quantized(model):
        configs = {_fake_quantize(m).config for m in quantized.values()}
        if len(configs) > 1 or (config is not None and configs != {config}):
            raise ValueError(f"the model was quantized with {configs}, pack_ was given {config}")
        (config,) = configs
        if not config.packs:
            raise ValueError(f"rule {config.rule!r} has no packed form, expected one of codes and scales")
    elif config is None:
        raise ValueError("the model is not quantized: quantize_ it first, or give pack_ a config")
    elif config.trains_scales:
        raise ValueError(
            f"rule {config.rule!r} trains its scales: quantize_ and train the model before it is packed, "
            "or choose one of absmean, twn, mse, binary"
        )
    else:
        quantized = _fake_quantized(quantize_(model, config, filter_fn))

    tables = _tables(model, config)
    for name, layer in (quantized | tables).items():
        if name not in tables:
            packed = TernaryLinear.from_linear(layer, config)
        elif config.embedding == "ternary":
            packed = TernaryTable.from_dense(layer, config)
        else:
            packed = Int8Table.from_float(layer.weight, config.torch_scale_dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
    for module in model.modules():
        if hasattr(module, "use_mem_eff_path"):  # mamba_ssm's Mamba2: its fused kernel wants a float weight
            module.use_mem_eff_path = False
    if isinstance(model, MambaLM):
        _describe(model, config, [name for name in quantized if name not in tables])
    return model


def replace_mixers_(model: nn.Module) -> nn.Module:
    """Replaces the mixers of a transformers or mamba_ssm model by ours, in place; returns the model.

    The parameters are the same and keep their names; the model's forward, generate() and caches work on.
    A_log, D and dt_bias become fp32.
    Raises ValueError on a model without such mixers, and on settings that this package does not run.
    """
    found = [
        (name, m) for name, m in model.named_modules() if (type(m).__module__, type(m).__name__) in MIXERS
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no mixers of transformers or mamba_ssm to replace")
    config = config_of(model)
    for name, mixer in found:
        parent, _, child = name.rpartition(".")
        ours = MIXERS[type(mixer).__module__, type(mixer).__name__].adopt(mixer, config)
        setattr(model.get_submodule(parent), child, ours)
    return model


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer that quantize_ or pack_ made ternary."""
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear | TernaryTable) or _fake_quantize(module):
            yield name, module


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))


def _tables(model: nn.Module, config: TernaryConfig) -> dict[str, nn.Module]:
    """The token tables, by name, that the config does not leave as they are."""
    if config.embedding == "float":
        return {}
    if not isinstance(model, MambaLM):
        raise ValueError(f"embedding is {config.embedding!r}, {type(model).__name__} takes only 'float'")
    tables = {"backbone.embeddings": model.backbone.embeddings, "lm_head": model.lm_head}
    return {name: table for name, table in tables.items() if table is not None}


def _fake_quantized(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if _fake_quantize(m)}


def _fake_quantize(layer: nn.Module) -> FakeQuantize | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    last = layer.parametrizations.weight[-1]
    return last if isinstance(last, FakeQuantize) else None


def _describe(model: MambaLM, config: TernaryConfig, names: list[str]) -> None:
    """Tells a MambaLM what is ternary."""
    if {name for name, _ in _linears(model) if config.selects(name)} or not all(map(config.selects, names)):
        config = dataclasses.replace(config, modules=tuple(names))  # not what the config's own names say
    model.ternary = config
