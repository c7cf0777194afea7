"""Generation: rows that do not depend on one another, the sampling filters, and text while it comes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, pack_
from ternary_ssm.generation import TextStreamer, generate, stream
from ternary_ssm.sampling import SamplingConfig, filter_scores

VOCAB = 93  # padded to 96
SMALL = {
    "Mamba1": {"layer": "Mamba1", "d_state": 4},
    "Mamba2": {"layer": "Mamba2", "d_state": 8, "headdim": 16},
}
PROMPTS = [[1, 2, 3, 4, 5], [7], [10, 20], [92] * 70, [0, 92]]
SAMPLED = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}


def build(layer: str = "Mamba2", ternary: bool = False, **options) -> MambaLM:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=32, n_layer=2, vocab_size=VOCAB, ssm_cfg=SMALL[layer], **options))
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(20)  # distributions far from uniform
    return pack_(model, TernaryConfig(group_size=32)) if ternary else model


@pytest.fixture(scope="module")
def model() -> MambaLM:
    return build()


class Fixed(torch.nn.Module):
    """A model whose logits [steps, b, 96] are given."""

    ternary = None

    def __init__(self, logits, **config):
        super().__init__()
        self.logits, self.step, self.device = logits, -1, torch.device("cpu")
        self.config = MambaConfig(d_model=32, n_layer=1, vocab_size=VOCAB, **config)
        self.fed = []

    def empty_cache(self, batch):
        return None

    def forward(self, ids, cache, cu_seqlens=None, last_only=False):
        self.step += 1
        self.fed.append(ids.tolist())
        return type("Output", (), {"logits": self.logits[self.step].unsqueeze(1)})


def fixed(*rows: list[int], **config) -> Fixed:
    """A model that says these tokens, whatever it reads."""
    logits = torch.zeros(len(rows[0]), len(rows), 96)
    for i, row in enumerate(rows):
        logits[torch.arange(len(row)), i, torch.tensor(row)] = 9.0
    return Fixed(logits, **config)


# Rows


@pytest.mark.parametrize("layer", SMALL)
@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_rows_are_independent(layer, ternary, options):
    model = build(layer, ternary)
    together = model.generate(PROMPTS, 12, seed=5, **options)
    for i, prompt in enumerate(PROMPTS):
        assert together[i][: len(prompt)] == prompt
        assert len(together[i]) == len(prompt) + 12
        assert model.generate([prompt], 12, seed=5 + i, **options) == [together[i]]
    assert together == model.generate(PROMPTS, 12, seed=5, **options)


@pytest.mark.parametrize("layer", SMALL)
def test_greedy_is_the_whole_sequence_argmax(layer):
    model = build(layer)
    for row, prompt in zip(model.generate(PROMPTS, 9), PROMPTS, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, :, :VOCAB]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == row[len(prompt) :]


def test_tensor_in_tensor_out(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model.generate(ids, 5)
    assert out.dtype == torch.int64
    assert out.tolist() == model.generate(ids.tolist(), 5)
    assert not out.is_inference()  # usable as training data
    assert torch.equal(model.generate(ids.int(), 5), out)


@pytest.mark.parametrize("prompts", [[], [[1]], [[1], [2, 3]]])
def test_no_new_tokens(model, prompts):
    assert model.generate(prompts, 0) == prompts


@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (2, 3)])
def test_no_new_tokens_for_a_tensor(model, shape):
    ids = torch.ones(shape, dtype=torch.int64)
    assert torch.equal(model.generate(ids, 0), ids)
    if not shape[0]:
        assert torch.equal(model.generate(ids, 4), ids)


def test_model_and_inputs_are_left_alone(model):
    prompts = [[1, 2], [3]]
    model.generate(prompts, 3)
    assert prompts == [[1, 2], [3]]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    steps = stream(model, prompts, 3)
    next(steps)
    assert not torch.is_inference_mode_enabled()


# Ends


def test_eos_ends_a_row_and_tensors_are_padded():
    rows = [5, 7, 9, 9], [5, 5, 5, 7]
    lists = generate(fixed(*rows), [[1], [2, 3]], 4, eos_token_id=7)
    assert lists == [[1, 5, 7], [2, 3, 5, 5, 5, 7]]
    ids = torch.tensor([[1], [2]])
    assert generate(fixed(*rows), ids, 4, eos_token_id=7).tolist() == [[1, 5, 7, 7, 7], [2, 5, 5, 5, 7]]
    padded = generate(fixed(*rows, pad_token_id=0), ids, 4, eos_token_id=7)
    assert padded.tolist() == [[1, 5, 7, 0, 0], [2, 5, 5, 5, 7]]


def test_stream_says_none_for_ended_rows_and_stops():
    rows = [5, 7, 9, 9], [8, 5, 5, 5]
    ends = SamplingConfig(eos_token_id=(7, 8))
    assert list(stream(fixed(*rows), [[1], [2]], 4, ends)) == [[5, 8], [7, None]]


def test_the_models_eos_is_the_default():
    rows = ([5, 7, 9],)
    assert generate(fixed(*rows, eos_token_id=7), [[1]], 3) == [[1, 5, 7]]
    assert generate(fixed(*rows, eos_token_id=7), [[1]], 3, eos_token_id=9) == [[1, 5, 7, 9]]
    assert generate(fixed(*rows, eos_token_id=7), [[1]], 3, eos_token_id=()) == [[1, 5, 7, 9]]


def test_one_forward_a_token():
    model = fixed([5, 6, 7])
    generate(model, [[1, 2]], 3)
    assert model.fed == [[[1, 2]], [[5]], [[6]]]  # the last token is not read


# Sampling


def test_same_seed_same_text(model):
    texts = [model.generate(PROMPTS, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    # Longer runs begin alike, also across the blocks in which random numbers are drawn.
    flat = torch.zeros(600, 1, 96)
    long, longer = (generate(Fixed(flat), [[1]], n, temperature=1.0, seed=3)[0] for n in (260, 600))
    assert longer[: len(long)] == long
    assert longer[1:257] != longer[257:513]


def test_no_seed_follows_torchs(model):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate([[1], [1]], 20, temperature=1.0))
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_padding_rows_are_never_sampled():
    logits = torch.zeros(1, 1, 96)
    logits[..., VOCAB:] = 100
    assert generate(Fixed(logits), [[1]], 1)[0][1] < VOCAB
    for seed in range(50):
        (row,) = generate(Fixed(logits), [[1]], 1, temperature=5.0, seed=seed)
        assert row[1] < VOCAB


def test_samples_follow_the_distribution():
    n = 20_000
    probs = torch.zeros(96)
    probs[3], probs[50], probs[92] = 0.5, 0.3, 0.2
    logits = probs.log().clamp(min=-80).repeat(1, n, 1)
    rows = generate(Fixed(logits), [[0]] * n, 1, temperature=1.0, seed=0)
    counts = torch.bincount(torch.tensor(rows)[:, 1], minlength=96)
    assert counts.sum() == counts[[3, 50, 92]].sum() == n
    assert (counts / n - probs).abs().max() < 4 * math.sqrt(0.25 / n)  # four standard deviations


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])  # the least and the largest that torch.rand gives
def test_the_ends_of_the_distribution(monkeypatch, number):
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), number, dtype=torch.float64))
    logits = torch.randn(200, 1, 96)
    (row,) = generate(Fixed(logits), [[0]], 200, temperature=1.0, top_k=2)
    likeliest = logits[:, 0, :VOCAB].topk(2).indices.sort().values
    assert row[1:] == likeliest[:, 0 if number == 0 else 1].tolist()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_the_narrowest_sampling_is_greedy(model, options):
    greedy = model.generate(PROMPTS, 8)
    assert model.generate(PROMPTS, 8, **{"temperature": 1.0} | options) == greedy


@pytest.mark.parametrize("top_k", [None, 1, 7, 93, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.6, 0.05])
@pytest.mark.parametrize("min_p", [0.0, 0.03, 0.7])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_filters_equal_transformers(top_k, top_p, min_p, spread):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(1)) * spread
    expected = scores
    if top_k is not None:
        expected = warpers.TopKLogitsWarper(top_k)(None, expected)
    expected = warpers.TopPLogitsWarper(top_p)(None, expected)
    expected = warpers.MinPLogitsWarper(min_p)(None, expected)
    assert torch.equal(filter_scores(scores, top_k, top_p, min_p), expected)


def test_filters_keep_equals():
    scores = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    kept = torch.tensor([[True, True, True, False]])
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"top_k": 2, "top_p": 0.99}, {"min_p": 0.3}):
        assert torch.equal(filter_scores(scores, **options).isfinite(), kept)


def test_repetition_penalty_equals_transformers(model):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    penalize = warpers.RepetitionPenaltyLogitsProcessor(1.7)
    (row,) = model.generate([PROMPTS[0]], 15, repetition_penalty=1.7)
    for end in range(len(PROMPTS[0]), len(row)):
        ids = torch.tensor([row[:end]])
        with torch.no_grad():
            scores = model(ids, last_only=True).logits[:, 0, :VOCAB]
        assert penalize(ids, scores).argmax().item() == row[end]
    assert row != model.generate([PROMPTS[0]], 15)[0]


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected 0 or"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": 0}, "top_k is 0, expected an integer from 1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1, expected 0 to 1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a positive"),
        ({"seed": -1}, "seed is -1"),
        ({"eos_token_id": -2}, "eos_token_id is -2"),
        ({"eos_token_id": (1, "x")}, "eos_token_id is 'x'"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected an integer from 0"),
        ({"max_new_tokens": 1.0}, "max_new_tokens is 1.0"),
        ({"input_ids": [[1], []]}, r"prompt 1 is \[\], expected a list of at least one"),
        ({"input_ids": [1, 2]}, "prompt 0 is 1, expected a list"),
        ({"input_ids": ["text"]}, "prompt 0 has the token id 't'"),
        ({"input_ids": [[1, VOCAB]]}, "prompt 0 has the token id 93, expected 0 to 92"),
        ({"input_ids": [[-1]]}, "prompt 0 has the token id -1"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "prompt 0 is"),
        ({"input_ids": torch.tensor([[VOCAB]])}, "token id 93"),
        ({"input_ids": torch.zeros(1, 2)}, r"input_ids is torch.float32 \[1, 2\], expected int64"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids is torch.int64 \[2\]"),
    ],
)
def test_refuses(model, options, words):
    with pytest.raises(ValueError, match=words):
        model.generate(**{"input_ids": [[1]], "max_new_tokens": 1} | options)


def test_stream_refuses_before_the_first_step(model):
    with pytest.raises(ValueError, match="prompt 0"):
        stream(model, [[]], 1)


def test_unknown_option(model):
    with pytest.raises(TypeError, match="top_q"):
        model.generate([[1]], 1, top_q=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}])
def test_logits_that_are_not_finite(value, options):
    logits = torch.zeros(2, 3, 96)
    logits[1, 2, 40] = value
    with pytest.raises(RuntimeError, match=r"NaN or infinite logits at new token 1 of prompts \[2\]"):
        generate(Fixed(logits), [[1], [2], [3]], 2, **options)
    logits[0, 2, 7] = 50  # row 2 has ended by then
    assert generate(Fixed(logits), [[1], [2], [3]], 2, eos_token_id=7)[2] == [3, 7]


# Text while it comes


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """One token a byte, in the byte-level alphabet of GPT-2 and GPT-NeoX."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def pieces(streamer: TextStreamer, ids: list[int]) -> list[str]:
    return [streamer.put(token) for token in ids] + [streamer.end()]


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 256), max_size=40))
def test_any_bytes_give_the_full_decode(byte_tokenizer, ids):
    assert "".join(pieces(TextStreamer(byte_tokenizer.decode), ids)) == byte_tokenizer.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=30))
def test_characters_come_whole(byte_tokenizer, text):
    out = pieces(TextStreamer(byte_tokenizer.decode), byte_tokenizer.encode(text).ids)
    assert "".join(out) == text
    if "\ufffd" not in text:
        assert out[-1] == ""  # nothing is held back once a character is complete
        assert not any("\ufffd" in piece for piece in out)


def test_decoders_that_look_back():
    """A SentencePiece decoder drops the first word's space, and only that."""
    words = ["▁a", "▁b", "c", "▁d"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "c"))
    tokenizer.decoder = decoders.Metaspace()
    assert pieces(TextStreamer(tokenizer.decode), [0, 1, 2, 3, 3]) == ["a", " b", "c", " d", " d", ""]


def split(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@settings(deadline=None, max_examples=500)
@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_stop_texts_however_tokens_cut_them(text, stop, cuts):
    words = split(text, cuts)
    streamer = TextStreamer(lambda ids: "".join(words[i] for i in ids), stop)
    out = "".join(pieces(streamer, list(range(len(words)))))
    # The text up to the stop text that is complete first.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    if ends:
        longest = max(len(s) for s in stop if text[: ends[0]].endswith(s))
        assert (out, streamer.stopped) == (text[: ends[0] - longest], True)
    else:
        assert (out, streamer.stopped) == (text, False)


def test_only_what_may_be_a_stop_text_is_held_back():
    words = ["one ", "two\n", "\nthree", " four"]
    streamer = TextStreamer(lambda ids: "".join(words[i] for i in ids), ["\n\n", "four!"])
    assert pieces(streamer, [0, 1, 3]) == ["one ", "two", "\n ", "four"]
    streamer = TextStreamer(lambda ids: "".join(words[i] for i in ids), ["\n\n"])
    assert pieces(streamer, [0, 1, 2, 3]) == ["one ", "two", "", "", ""]
    assert streamer.stopped


def test_empty_stop_text():
    with pytest.raises(ValueError, match="empty"):
        TextStreamer(str, [""])
