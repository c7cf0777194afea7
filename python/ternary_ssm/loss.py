"""The distillation loss, and its gradient, without the logits of a whole batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def distillation_loss(
    hidden_s: Tensor,
    hidden_t: Tensor,
    head_s: Tensor,
    head_t: Tensor,
    labels: Tensor,
    kl_weight: float = 0.5,
    temperature: float = 1.0,
    chunk: int = 2048,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, KL, CE), means over labels [...]: loss = kl_weight T^2 KL + (1 - kl_weight) CE.

    KL = KL(softmax(teacher / T) || softmax(student / T)), in nats. hidden [..., d] and head [v, d], where the
    two d may differ; a label is the token that follows its position. Only loss has a gradient, to hidden_s
    and head_s, once. Logits exist for `chunk` positions at a time, never for the whole batch.
    """
    if head_s.shape[0] != head_t.shape[0]:
        raise ValueError(f"the student has {head_s.shape[0]} logits, the teacher {head_t.shape[0]}")
    student, teacher = (hidden_s.flatten(0, -2), head_s), (hidden_t.flatten(0, -2), head_t)
    return _ChunkedLoss.apply(*student, *teacher, labels.flatten(), kl_weight, temperature, chunk)


class _ChunkedLoss(torch.autograd.Function):
    """Takes the gradient of each chunk while its logits are at hand: none are kept or computed twice."""

    @staticmethod
    def forward(ctx, x, head_s, hidden_t, head_t, labels, kl_weight, T, chunk):
        kind, acc = x.device.type, torch.promote_types(x.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        w = head_s.to(dtype)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(head_s, dtype=acc)
        kl, ce = torch.zeros(2, dtype=acc, device=x.device)
        for begin in range(0, len(labels), chunk):
            rows = slice(begin, begin + chunk)
            chunk_x = x[rows].to(dtype)
            grad = F.linear(chunk_x, w)  # logits, which become their own gradient
            logits_t = F.linear(hidden_t[rows], head_t).to(grad.dtype)
            losses = torch.ops.ternary.distillation(grad, logits_t, labels[rows], kl_weight, T)
            del logits_t
            kl += losses[0].sum()
            ce += losses[1].sum()
            grad_x[rows] = grad @ w
            grad_w += grad.T @ chunk_x
            del grad  # before the next chunk's
        ctx.count = len(labels)
        ctx.save_for_backward(grad_x, grad_w)
        kl, ce = kl / ctx.count, ce / ctx.count
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * T**2 * kl + (1 - kl_weight) * ce, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _kl, _ce):
        # In place: a second copy of the head's gradient would be the peak of the step's memory. Autograd
        # refuses a second backward, since the saved tensors have changed.
        scale = grad_loss / ctx.count
        grad_x, grad_w = (grad.mul_(scale) for grad in ctx.saved_tensors)
        return grad_x, grad_w, None, None, None, None, None, None
