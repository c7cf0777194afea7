"""Watching a run: zero ratios and what to do about a collapse, the first tensor that is not finite, logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .models import MambaLM
from .quantizer import FakeQuantize

# Zero ratios that warn and that end a run, by rule. Gaussian and Laplacian weights give 0.31 and 0.39 under
# absmean, 0.42 and 0.50 under twn, 0.46 and 0.63 under mse, where trained scales may rightly go. A collapse
# goes to 0.9.
ZERO_RATIO_LIMITS = {
    "absmean": (0.5, 0.6),
    "twn": (0.6, 0.7),
    "mse": (0.7, 0.8),
    "binary": (0.5, 0.6),  # latent weights that are 0
    "learned": (0.7, 0.8),
    "bounded": (0.7, 0.8),
    "shifted": (0.5, 0.6),  # values that are 0
}


def summary(ratios: dict[str, float]) -> dict[str, Any]:
    """The fields of a record of metrics.jsonl."""
    mean = sum(ratios.values()) / len(ratios)
    ends = {"zero_ratio_min": min(ratios.values()), "zero_ratio_max": max(ratios.values())}
    return {"zero_ratio_mean": mean} | ends | {"zero_ratio": ratios}


@torch.no_grad()
def reset_scales_(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    """Sets the trained scales of a layer back to absmean, and what the optimizer remembers of them to 0."""
    weight = layer.parametrizations.weight
    latent = weight.original
    latent = latent.full_tensor() if hasattr(latent, "full_tensor") else latent
    fresh = FakeQuantize(weight[-1].config, latent).named_parameters()
    for name, value in fresh:
        parameter = getattr(weight[-1], name)
        parameter.copy_(distributed.split_like(value.detach(), parameter))
        for state in optimizer.state.get(parameter, {}).values():
            if isinstance(state, Tensor) and state.shape == parameter.shape:
                state.zero_()


def first_not_finite(
    replica: Callable[..., Any], student: MambaLM, forwards: list[Callable[[MambaLM], Any]]
) -> str | None:
    """Names the first tensor that is not finite: a parameter, then an activation in the order of the forward,
    then a gradient in the order of the backward; None if there is none. All ranks must call it.

    forwards: the step's, run again without gradients.
    """
    parameters = list(student.named_parameters())
    wrong = (f"parameter {name}" for name, p in parameters if not _finite(p))
    if (found := _of_any_rank(wrong)) is None:
        found = _of_any_rank(_activations(replica, student, forwards))
    if found is None:
        pairs = [(name, p.grad) for name, p in reversed(parameters) if p.grad is not None]
        found = _of_any_rank(f"gradient of {name}" for name, grad in pairs if not _finite(grad))
    return found


def _finite(tensor: Tensor) -> bool:
    return bool(distributed.local(tensor.detach()).isfinite().all())


def _of_any_rank(names: Iterator[str]) -> str | None:
    found = distributed.gather_objects(next(names, None))
    return next((name for name in found if name is not None), None)


def _activations(replica, student: MambaLM, forwards: list[Callable]) -> Iterator[str]:
    wrong: list[str] = []
    handles = []
    for name, module in student.named_modules():

        def look(_module, _inputs, output, name=name):
            if isinstance(output, Tensor) and output.is_floating_point() and not _finite(output):
                wrong.append(f"output of {name}")

        handles.append(module.register_forward_hook(look))
    with torch.no_grad():
        for forward in forwards:  # all of them on every rank: they communicate
            replica(forward)
    for handle in handles:
        handle.remove()
    yield from wrong


class TensorBoard:
    """Event files of the records of a run, in out/tensorboard."""

    def __init__(self, out: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("tensorboard needs its package: pip install 'ternary-ssm[train]'") from None
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "tokens"):
                self._writer.add_scalar(name, value, step)
        if ratios := record.get("zero_ratio"):
            for name, ratio in ratios.items():
                self._writer.add_scalar(f"zero_ratio/{name}", ratio, step)
            self._writer.add_histogram("zero_ratio", torch.tensor(list(ratios.values())), step)
        self._writer.flush()
