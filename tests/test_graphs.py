"""Generation by graphs: the eager path's tokens, however the graphs are shared, dropped or raced.

On the CPU a captured graph is the function itself, called again: everything around the graphs is tested.
"""

import copy
import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, generation, graphs, pack_
from ternary_ssm.decoder import Decoder
from ternary_ssm.sampling import SamplingConfig

VOCAB = 93
PROMPTS = [[1, 2, 3, 4, 5], [7], [10, 20], [92] * 70, [0, 92]]
SAMPLED = {
    "temperature": 1.3,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "seed": 3,
}
SHAPES = {  # the last one takes the Decoder on a GPU too
    "Mamba1": (32, {"layer": "Mamba1", "d_state": 4}),
    "Mamba2": (32, {"layer": "Mamba2", "d_state": 8, "headdim": 16}),
    "decoder": (256, {"layer": "Mamba2", "headdim": 32}),
}


@pytest.fixture(autouse=True)
def captures(device, monkeypatch) -> list:
    """What was captured; on the CPU by stand-ins for torch.cuda."""
    made, capture = [], graphs.Pool.capture
    if device == "cpu":
        stream = SimpleNamespace(wait_stream=lambda other: None)
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)
        monkeypatch.setattr(graphs.Pool, "__init__", lambda *_: None)
        monkeypatch.setattr(graphs, "has_kernel", lambda *_: True)
        monkeypatch.setattr(generation, "_steps", graphs.steps)
        capture = lambda pool, function: SimpleNamespace(replay=function)  # noqa: E731
    else:
        make = graphs.Pool.__init__

        def make_and_forget(*args) -> None:
            make(*args)
            made.pop()  # the anchor

        monkeypatch.setattr(graphs.Pool, "__init__", make_and_forget)
    monkeypatch.setattr(graphs.Pool, "capture", lambda *args: made.append(capture(*args)) or made[-1])
    yield made
    graphs._runners.clear()


def build(
    shape: str = "decoder", device: str = "cpu", ternary: bool = True, embedding: str = "float", **options
) -> MambaLM:
    torch.manual_seed(0)
    d_model, cfg = SHAPES[shape]
    model = MambaLM(MambaConfig(d_model=d_model, n_layer=2, vocab_size=VOCAB, ssm_cfg=cfg, **options))
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(20)
    if ternary:
        pack_(model, TernaryConfig(group_size=128 if shape == "decoder" else 32, embedding=embedding))
    on_decoder = shape == "decoder" and ternary and device == "cuda"  # which wants 16 bits there
    return model.to(device, torch.float16 if on_decoder else torch.float32).eval()


_eager = generation._steps  # before the fixture replaces it


def eager(model: MambaLM, prompts: list[list[int]], count: int, **sampling) -> list[list[int]]:
    """A token at a time, without graphs: by the layers, or by the Decoder where it rounds otherwise."""
    model, config = copy.deepcopy(model), SamplingConfig(**sampling)
    with torch.inference_mode():
        if model.device.type == "cpu" or model.dtype == torch.float32:
            steps = list(_eager(model, prompts, count, config))
        else:
            runner = graphs.Runner(model)
            loop, steps = graphs.Loop(runner, model, len(prompts), config), []
            loop.sampler.start(prompts, config.seed)
            logits = runner.prefill(model, prompts, loop.cache)
            for step in range(count):
                loop.sampler.draw(step)
                loop.choose(logits) if step == 0 else loop.advance(model)
                steps.append(loop.tokens.tolist())
    return [prompt + [step[i] for step in steps] for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_equals_the_eager_path(device, captures, shape, ternary, sampling):
    model = build(shape, device, ternary)
    served = ["decoder"] if device == "cuda" else ["decoder", "Mamba2"]  # in 16 bits alone on a GPU
    assert Decoder.supports(model, 5) == (shape in served and ternary)
    expected = eager(model, PROMPTS, 70, **sampling)
    for _ in range(3):
        assert model.generate(PROMPTS, 70, **sampling) == expected
    captures_prefill = next(iter(graphs._runners.values())).captures_prefill
    assert len(captures) == 1 + captures_prefill  # the loop in the first call, the prefill in the second
    for count in (1, 2, 3, 33):
        shorter = [row[: len(prompt) + count] for row, prompt in zip(expected, PROMPTS, strict=True)]
        assert model.generate(PROMPTS, count, **sampling) == shorter
    assert len(captures) == 1 + captures_prefill
    for i, prompt in enumerate(PROMPTS[:2]):
        alone = sampling | ({"seed": 3 + i} if sampling else {})
        assert model.generate([prompt], 70, **alone) == [expected[i]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_a_ternary_table(device, captures, shape, prompts):
    model = build(shape, device, embedding="ternary")
    expected = eager(model, prompts, 40)
    assert [model.generate(prompts, 40) for _ in range(3)] == [expected] * 3
    assert captures


def test_random_numbers_of_many_blocks(device):
    model = build(device=device)
    sampling = {"temperature": 1.0, "seed": 1}
    expected = eager(model, [[1], [2]], 300, **sampling)  # Sampler.BLOCK is 256
    assert [model.generate([[1], [2]], 300, **sampling) for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("rows", [1, 9, 40])  # 9 and 40 exceed the persistent kernel
def test_batches_and_long_prompts(device, rows):
    model = build(device=device)
    prompts = torch.randint(VOCAB, (rows, 2100 // rows)).tolist()
    assert sum(map(len, prompts)) > 2048
    assert model.generate(prompts, 5) == eager(model, prompts, 5)
    prompts = [prompt[:45] for prompt in prompts]
    for _ in range(3):
        assert model.generate(prompts, 40) == eager(model, prompts, 40)


def test_a_prompt_as_long_as_its_bucket(device):
    model = build(device=device)
    for length in (15, 16, 17, 24, 2048):
        assert length == 15 or length == 17 or length in graphs.BUCKETS
        prompt = torch.randint(VOCAB, (1, length)).tolist()
        expected = eager(model, prompt, 4)
        assert [model.generate(prompt, 4) for _ in range(3)] == [expected] * 3


def test_side_by_side(device):
    """Two generations of one batch size and one of another, a token each in turn."""
    model = build(device=device)
    calls = [([[1], [2]], 50), ([[3, 4], [5]], 60), ([[6]], 40), ([[1], [2]], 50)]
    expected = [eager(model, *call) for call in calls]
    rows = [copy.deepcopy(prompts) for prompts, _ in calls]
    running = {i: generation.stream(model, *call) for i, call in enumerate(calls)}
    while running:
        for i, steps in list(running.items()):
            tokens = next(steps, None)
            if tokens is None:
                del running[i]
                continue
            for row, token in zip(rows[i], tokens, strict=True):
                row.append(token)
    assert rows == expected


def test_ends_and_abandoned_streams(device):
    model = build(device=device)
    expected = eager(model, PROMPTS, 60)
    eos = expected[0][5 + 9]
    ended = model.generate(PROMPTS, 60, eos_token_id=eos)
    for got, full, prompt in zip(ended, expected, PROMPTS, strict=True):
        new = full[len(prompt) :]
        assert got == prompt + (new[: new.index(eos) + 1] if eos in new else new)
    steps = generation.stream(model, PROMPTS, 60)
    assert [next(steps)[0] for _ in range(7)] == expected[0][5:12]
    del steps
    assert model.generate(PROMPTS, 60) == expected


def test_nan_is_told(device):
    model = build(device=device, tie_embeddings=False)
    other, row = eager(model, [[3], [1, 2]], 40)
    row = row[2:]
    last = next(i for i in range(5, 40) if row[i] not in other + row[:i])  # a token of its own
    poison = row[last]
    with torch.no_grad():
        model.backbone.embeddings.weight[poison] = torch.nan
    tokens = []
    words = rf"NaN or infinite logits at new token {last + 1} of prompts \[1\]"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            for step in generation.stream(model, [[3], [1, 2]], 40):
                tokens.append(step[1])
    assert tokens == row[: last + 1] * 2


def test_a_changed_model(device):
    model = build(device=device)

    def check() -> None:
        assert [model.generate(PROMPTS, 20) for _ in range(2)] == [eager(model, PROMPTS, 20)] * 2

    check()
    with torch.no_grad():
        for block in model.backbone.layers:  # in place
            block.mixer.A_log.add_(1)
            block.mixer.norm.weight.mul_(0.7)
    check()
    model.backbone.layers[0].mixer = build(device=device, norm_epsilon=0.1).backbone.layers[1].mixer
    check()
    dtype = model.dtype
    model.bfloat16().to(dtype)
    assert model not in graphs._runners
    check()
    steps = generation.stream(model, [[1]], 100)
    next(steps)
    model.bfloat16()
    with pytest.raises(RuntimeError, match="was moved or cast"):
        list(steps)


def test_trainable_afterwards(device):
    model = build(device=device)
    model.generate([[1]], 5)
    model(torch.tensor([[1, 2, 3]], device=device)).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_kept(device, monkeypatch):
    model = build(device=device)
    for top_k in range(1, graphs.LOOPS + 4):
        model.generate([[1]], 4, temperature=1.0, top_k=top_k)
    for length in range(1, 10 * graphs.PREFILLS, 9):
        model.generate([[1] * length], 1)
    runner = graphs._runners[model]
    assert len(runner.loops) == graphs.LOOPS and len(runner.prefills) <= graphs.PREFILLS
    monkeypatch.setattr(graphs, "LOOP_BYTES", 3 * model.empty_cache(1).ssm.nbytes)
    model.generate([[1], [2]], 4)
    assert [loop.key[0] for loop in runner.loops] == [1, 2]
    model.generate([[1]] * 4, 4)
    assert not runner.loops


def test_nothing_outlives_the_model(device):
    if device == "cpu":
        pytest.skip("the stand-in of a graph holds the model")
    model = build(device=device)
    for _ in range(3):
        model.generate([[1]], 40)
    runner = weakref.ref(graphs._runners[model])
    del model
    gc.collect()
    assert runner() is None


def test_when_no_graph_is_left(device, monkeypatch):
    """A batch whose states are too large to keep gives its graph back; the next call captures again."""
    monkeypatch.setattr(graphs, "LOOP_BYTES", 0)
    model = build(device=device)
    first = model.generate([[1], [2]], 6)
    assert not graphs._runners[model].loops
    assert model.generate([[1], [2]], 6) == first
