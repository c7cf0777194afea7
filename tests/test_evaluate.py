"""Loss and perplexity of held-out tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ternary_ssm.evaluate import nats_per_token, perplexity
from ternary_ssm.surgery import quantize_
from test_distill import TERNARY, VOCAB, make_teacher, one_thread  # noqa: F401


@pytest.mark.parametrize(
    ("n", "length", "batch"), [(2, 1, 1), (2, 8, 2), (17, 8, 2), (50, 7, 3), (51, 50, 4)]
)
def test_nats_per_token_is_the_mean_over_all_tokens(n, length, batch):
    model = quantize_(make_teacher(), TERNARY)
    tokens = np.random.RandomState(0).randint(0, VOCAB, n).astype(np.uint16)
    ids, losses = torch.from_numpy(tokens.astype(np.int64)), []
    for begin in range(0, n - 1, length):
        window = ids[begin : begin + length + 1]
        logits = model(window[None, :-1]).logits[0]
        losses.append(F.cross_entropy(logits, window[1:], reduction="none"))
    expected = torch.cat(losses).double()
    assert len(expected) == n - 1
    with torch.autocast("cpu", torch.bfloat16):  # must not matter
        found = nats_per_token(model, tokens, length, batch)
    assert found == pytest.approx(expected.mean().item(), rel=1e-5)


def test_perplexity_of_no_opinion_is_the_vocabulary():
    model = make_teacher()
    model.backbone.embeddings.weight.data.zero_()
    assert perplexity(model, np.arange(40), 8, 2) == pytest.approx(VOCAB, rel=1e-5)
    with pytest.raises(ValueError, match="1 tokens, expected at least 2"):
        perplexity(model, np.arange(1), 8, 2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        perplexity(model, np.arange(9), 8, 0)
