"""MambaLM against transformers: checkpoints that transformers wrote and those that it reads."""

import json

import pytest
import torch

from ternary_ssm import MambaConfig, MambaLM

transformers = pytest.importorskip("transformers")

# The published models with d_model, headdim and Mamba-2's d_state divided by 16: as many heads as theirs.
WIDTHS = {"130m": 48, "370m": 64, "780m": 96, "1.3b": 128, "2.7b": 160}
DTYPES = ["float32", "bfloat16", "float16"]
VOCAB = 89


def mamba2(d_model: int = 64, **options):
    settings = {"head_dim": 4, "state_size": 8, "n_groups": 1, "num_hidden_layers": 2, "vocab_size": VOCAB}
    settings |= {"chunk_size": 16, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True}
    settings |= {"num_heads": 2 * d_model // settings["head_dim"]} | options
    return transformers.Mamba2Config(hidden_size=d_model, **settings)


def mamba1(d_model: int = 64, **options):
    settings = {"num_hidden_layers": 2, "vocab_size": VOCAB, "eos_token_id": None, "pad_token_id": None}
    return transformers.MambaConfig(hidden_size=d_model, **settings | options)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Every vector that starts as a constant gets values of its own, so that none can be lost or swapped."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("A_log", "conv1d.bias", "in_proj.bias", "out_proj.bias", "dt_bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def written(config, directory, dtype: str = "float32"):
    """A model that transformers saved in `dtype`, as transformers loads it for fp32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomized(model).to(getattr(torch, dtype)).save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def check_equal(ours: MambaLM, theirs, stepwise: bool = True) -> None:
    ids = torch.randint(0, VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert expected.std() > 0.05
    assert relative_error(ours(ids).logits, expected) < 1e-4
    if not stepwise:
        return
    cache = ours.empty_cache(2)
    pieces = [ours(ids[:, :3], cache).logits]
    pieces += [ours(ids[:, t : t + 1], cache).logits for t in range(3, ids.shape[1])]
    assert relative_error(torch.cat(pieces, 1), expected) < 1e-4

    prompt = ids[:1, :7]
    cache = ours.empty_cache(1)
    tokens, logits = prompt, ours(prompt, cache).logits
    for _ in range(12):
        token = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, token], 1)
        logits = ours(token, cache).logits
    assert torch.equal(tokens, theirs.generate(prompt, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("make", [mamba1, mamba2])
@pytest.mark.parametrize("size", WIDTHS)
def test_published_shapes(make, size, tmp_path):
    i = list(WIDTHS).index(size)
    config = make(WIDTHS[size], tie_word_embeddings=i % 2 == 0, num_hidden_layers=2 + i % 2)
    theirs = written(config, tmp_path, DTYPES[i % 3])
    check_equal(MambaLM.from_pretrained(tmp_path, dtype=torch.float32), theirs)


@pytest.mark.parametrize(
    "config",
    [
        lambda: mamba2(n_groups=2),
        lambda: mamba2(n_groups=8, use_bias=True, tie_word_embeddings=False),
        lambda: mamba2(use_conv_bias=False, residual_in_fp32=False, layer_norm_epsilon=1e-2),
        lambda: mamba2(expand=4, num_heads=64, conv_kernel=2),
        lambda: mamba1(use_bias=True, use_conv_bias=False, tie_word_embeddings=False),
        lambda: mamba1(time_step_rank=7, expand=3, conv_kernel=3, state_size=5, layer_norm_epsilon=1e-2),
    ],
)
def test_every_option(config, tmp_path):
    theirs = written(config(), tmp_path)
    ours = MambaLM.from_pretrained(tmp_path)
    assert ours.config.residual_in_fp32 == theirs.config.residual_in_fp32
    check_equal(ours, theirs)


def test_time_step_limit(tmp_path):
    """Whole sequences only: the one-step code of transformers forgets the limit."""
    theirs = written(mamba2(time_step_limit=(0.02, 0.05)), tmp_path)
    ours = MambaLM.from_pretrained(tmp_path)
    assert ours.config.dt_limit == (0.02, 0.05)
    check_equal(ours, theirs, stepwise=False)


@pytest.mark.parametrize("infinity", [{"__float__": "Infinity"}, float("inf")])
def test_both_spellings_of_infinity(infinity, tmp_path):
    written(mamba2(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"time_step_limit": [0.0, infinity]}))
    assert MambaLM.from_pretrained(tmp_path).config.dt_limit == (0.0, None)


@pytest.mark.parametrize("make", [mamba1, mamba2])
def test_shards_of_transformers(make, tmp_path):
    model = randomized(transformers.AutoModelForCausalLM.from_config(make()))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    check_equal(MambaLM.from_pretrained(tmp_path), model.eval())


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(d_model=48, n_layer=2, vocab_size=VOCAB, ssm_cfg={"headdim": 8, "d_state": 16}),
        MambaConfig(
            d_model=64,
            n_layer=3,
            vocab_size=VOCAB,
            ssm_cfg={"headdim": 8, "ngroups": 2, "bias": True, "dt_limit": (0.0, 0.5)},
            tie_embeddings=False,
            pad_vocab_size_multiple=16,
            norm_epsilon=1e-3,
            residual_in_fp32=False,
            eos_token_id=[0, 3],
        ),
        MambaConfig(d_model=48, n_layer=2, vocab_size=VOCAB, ssm_cfg={"layer": "Mamba1"}),
        MambaConfig(
            d_model=40,
            n_layer=2,
            vocab_size=VOCAB,
            ssm_cfg={"layer": "Mamba1", "bias": True, "conv_bias": False, "dt_rank": 5},
            tie_embeddings=False,
            bos_token_id=1,
        ),
    ],
)
def test_transformers_reads_a_dense_save(config, tmp_path):
    torch.manual_seed(0)
    ours = randomized(MambaLM(config)).eval()
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.bos_token_id == config.bos_token_id
    assert theirs.generation_config.eos_token_id == config.eos_token_id
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    finite = config.is_mamba2 and config.dt_limit[1] is not None
    check_equal(ours, theirs.eval(), stepwise=not finite and config.eos_token_id is None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_exact(dtype, tmp_path):
    written(mamba2(tie_word_embeddings=False), tmp_path / "theirs", dtype)
    MambaLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    options = {"dtype": getattr(torch, dtype)}
    a, b = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, **options).state_dict()
        for name in ("theirs", "ours")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
