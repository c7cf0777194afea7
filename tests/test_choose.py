"""choose: the greedy choice of a step's tokens."""

import pytest
import torch

import ternary_ssm  # noqa: F401
from recurrences import FLOATS
from ternary_ssm import reference

choose = torch.ops.ternary.choose


def room(rows, device, slots=4, step=0):
    """tokens, chosen and step as a step of decoding has them."""
    tokens, chosen = torch.full((rows,), -7), torch.full((slots, rows), -7)
    return [t.to(device) for t in (tokens, chosen, torch.tensor([step, 0]))]


def both(logits, vocab, **options):
    """What the operator and the reference leave."""
    rows = logits.shape[0]
    ours, wanted = room(rows, logits.device, **options), room(rows, "cpu", **options)
    choose(logits, vocab, *ours)
    reference.choose(logits.cpu(), vocab, *wanted)
    return [t.cpu() for t in ours], wanted


# The GPU reads 16 bytes at a time, by 1024 threads.
@pytest.mark.parametrize("columns", [1, 7, 8, 1023, 1025, 8192, 8199, 50288])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_first_of_the_largest(rows, columns, dtype, device):
    if rows * columns > 1_000_000 and device == "cpu":
        rows = 2
    logits = torch.randn(rows, columns).to(dtype).to(device)  # in 16 bits with many equals
    ours, wanted = both(logits, max(1, columns - 11), step=6)
    assert all(map(torch.equal, ours, wanted))


def test_equals_and_zeros_of_both_signs(device):
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0], [2.0, 5.0, 5.0, 5.0], [-3.0, -3.0, -3.0, -3.0]])
    (tokens, *_), wanted = both(logits.to(device), 4)
    assert tokens.tolist() == wanted[0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1500, 2999])
def test_logits_that_are_not_finite(bad, place, device):
    logits = torch.randn(3, 3001).to(device)
    logits[1, place] = bad
    logits[2, 3000] = bad  # behind the vocabulary
    (tokens, chosen, _), wanted = both(logits, 3000)
    assert torch.equal(chosen, wanted[1])
    assert chosen[0, 1] == -1 and (chosen[0, [0, 2]] >= 0).all()
    assert (0 <= tokens).all() and (tokens < 3000).all()


def test_a_row_of_nan(device):
    tokens, chosen, step = room(1, device)
    choose(torch.full((1, 20), torch.nan, device=device), 20, tokens, chosen, step)
    assert chosen[0].tolist() == [-1] and 0 <= tokens.item() < 20


def test_steps_go_round(device):
    tokens, chosen, step = room(2, device, slots=3)
    logits = torch.randn(7, 2, 50).to(device)
    for each in logits:
        choose(each, 50, tokens, chosen, step)
    assert step.tolist() == [7, 0]
    best = logits.argmax(-1)
    assert torch.equal(chosen, best[[6, 4, 5]]) and torch.equal(tokens, best[6])


def test_columns_of_a_wider_tensor(device):
    wide = torch.randn(3, 333).to(device)
    ours, wanted = both(wide[:, 5:105], 100)
    assert all(map(torch.equal, ours, wanted))


def test_no_rows(device):
    tokens, chosen, step = room(0, device)
    choose(torch.randn(0, 9, device=device), 9, tokens, chosen, step)


def test_opcheck(device):
    torch.library.opcheck(choose, (torch.randn(2, 30, device=device), 28, *room(2, device)))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.randn(2)}, "logits must have 2 dimensions, not 1"),
        ({"logits": torch.randn(2, 30).int()}, "logits must be Float, BFloat16 or Half, not Int"),
        ({"logits": torch.randn(30, 2).T}, "logits must have contiguous rows"),
        ({"vocab_size": 0}, "vocab_size must be from 1 to the 30 columns of logits, not 0"),
        ({"vocab_size": 31}, "vocab_size must be from 1 to the 30 columns of logits, not 31"),
        ({"tokens": torch.zeros(3).long()}, r"tokens must be \[2\], not \[3\]"),
        ({"tokens": torch.zeros(2)}, "tokens must be Long, not Float"),
        ({"chosen": torch.zeros(0, 2).long()}, "chosen must have at least one row"),
        ({"chosen": torch.zeros(4, 3).long()}, r"chosen must be \[4, 2\], not \[4, 3\]"),
        ({"step": torch.zeros(1).long()}, r"step must be \[2\], not \[1\]"),
    ],
)
def test_refusals(change, message):
    tokens, chosen, step = room(2, "cpu")
    given = {"logits": torch.randn(2, 30), "vocab_size": 30, "tokens": tokens, "chosen": chosen, "step": step}
    given |= change
    with pytest.raises(RuntimeError, match=message):
        choose(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in given.values()))
