"""The operator under distillation_loss; the loss itself: test_distill.py."""

import re

import pytest
import torch

import ternary_ssm  # noqa: F401
from ternary_ssm import reference

distillation = torch.ops.ternary.distillation
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [(0.5, 1.0), (0.3, 2.0), (1.0, 0.7), (0.0, 1.0)]


def logits(rows: int, vocab: int, device: str, dtype=torch.float64):
    student, teacher = (3 * torch.randn(rows, vocab, device=device).to(dtype) for _ in range(2))
    return student, teacher, torch.randint(vocab, (rows,), device=device)


@pytest.mark.parametrize("kl_weight, temperature", WEIGHTS)
def test_the_reference_is_the_loss_and_its_gradient(kl_weight, temperature):
    torch.manual_seed(0)
    student, teacher, labels = logits(5, 33, "cpu")
    x = student.clone().requires_grad_()
    log_s, log_t = ((v / temperature).log_softmax(-1) for v in (x, teacher))
    kl = torch.nn.functional.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    ce = torch.nn.functional.cross_entropy(x, labels, reduction="none")
    (kl_weight * temperature**2 * kl + (1 - kl_weight) * ce).sum().backward()
    losses = reference.distillation(student, teacher, labels, kl_weight, temperature)
    torch.testing.assert_close(losses, (kl.detach(), ce.detach()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student, x.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kl_weight, temperature", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab", [(0, 8), (1, 1), (3, 7), (13, 1000), (2, 50288)])
def test_matches_the_reference_in_fp64(rows, vocab, dtype, kl_weight, temperature, device):
    student, teacher, labels = logits(rows, vocab, device, dtype)
    exact, plain, again = student.double(), student.clone(), student.clone()
    expected = reference.distillation(exact, teacher.double(), labels, kl_weight, temperature)
    reference.distillation(plain, teacher, labels, kl_weight, temperature)
    losses = distillation(student, teacher, labels, kl_weight, temperature)
    repeated = distillation(again, teacher, labels, kl_weight, temperature)
    assert torch.equal(student, again) and all(map(torch.equal, losses, repeated))
    for ours, true in zip(losses, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=2e-5)
    if rows:
        error, allowed = (student - exact).abs().max(), (plain - exact).abs().max()
        assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_a_good_citizen(dtype, device):
    arguments = logits(3, 16, device, dtype)
    torch.library.opcheck(distillation.default, (*arguments, 0.5, 1.0))


S, L = torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)
REFUSED = [
    ((S.double(), S, L), "student must be Float, BFloat16 or Half, not Double"),
    ((S[0], S, L), "student must have 2 dimensions, not 1"),
    ((S.T, S.T, L), "student must be contiguous"),
    ((S[:, :0], S[:, :0], L), "student must have at least one column, not [4, 0]"),
    ((S, S.half(), L), "teacher must be Float, not Half"),
    ((S, S[:3], L), "teacher must be [4, 8], not [3, 8]"),
    ((S, S, L.int()), "labels must be Long, not Int"),
    ((S, S, L[:3]), "labels must be [4], not [3]"),
]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestCuda:
    @pytest.mark.parametrize("arguments, message", REFUSED)
    def test_refuses(self, arguments, message):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            distillation(*(t.cuda() for t in arguments), 0.5, 1.0)

    def test_a_label_outside_the_vocabulary_is_seen(self):
        """Refusing it would make the host wait."""
        student, teacher, labels = logits(3, 8, "cuda", torch.float32)
        labels[1] = 8
        _, ce = distillation(student, teacher, labels, 0.5, 1.0)
        assert ce.isnan().tolist() == [False, True, False]
