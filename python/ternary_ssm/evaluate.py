"""How well a model predicts text."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from .models import MambaLM

_CHUNK = 1024  # tokens whose logits are held at once: 200 MiB in fp32 at 50 k entries


def nats_per_token(model: MambaLM, tokens: np.ndarray, sequence_length: int, batch_size: int) -> float:
    """Mean negative log-likelihood of tokens [n] after the first, each predicted once.

    Window w reads tokens [w l, w l + l), l = sequence_length, and predicts the next of each; the last window
    may be shorter. Runs in the model's own dtype, under no autocast.
    Raises ValueError if there is nothing to predict.
    """
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens, expected at least 2: the first one is not predicted")
    device, last = model.device, len(tokens) - 1
    full = last // sequence_length * sequence_length  # tokens predicted in whole windows
    step = batch_size * sequence_length
    spans = [(i, min(i + step, full), sequence_length) for i in range(0, full, step)]
    if full < last:
        spans.append((full, last, last - full))
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), parametrize.cached():
        for begin, end, length in spans:
            ids = torch.from_numpy(np.asarray(tokens[begin : end + 1]).astype(np.int64)).to(device)
            hidden = model.backbone(ids[:-1].view(-1, length)).flatten(0, 1)
            for h, labels in zip(hidden.split(_CHUNK), ids[1:].split(_CHUNK), strict=True):
                total += F.cross_entropy(model.logits(h).float(), labels, reduction="none").double().sum()
    return total.item() / last


def perplexity(model: MambaLM, tokens: np.ndarray, sequence_length: int, batch_size: int) -> float:
    """exp(nats_per_token), infinite where that overflows."""
    nats = nats_per_token(model, tokens, sequence_length, batch_size)
    return math.exp(nats) if nats < 709 else math.inf  # exp(709) is the largest power in float64
