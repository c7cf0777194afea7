"""Whole models with random weights of the published shapes: a step of decoding, and reading a prompt.

ternary_ssm's step is the one that generate() runs: layers, head and the choice of a token; mamba_ssm's (where
it can be imported, 16-bit weights) gets a greedy choice, too. "graph" is one CUDA graph of it, "eager" one
launch after another. Nothing is flushed from the caches between steps, as in use.
On a CPU llama.cpp (where llama_cpp can be imported) runs the same model, exported and with the head that its
own quantization gives; all implementations take turns.
"""

import argparse
import gc
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import Record, floor_ms, measure, measure_in_turn, name_of, show
from timing import DTYPES, MODELS, begin, chosen_models, comma_list, write
from torch import nn

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, graphs
from ternary_ssm.checkpoints import gguf
from ternary_ssm.decoder import Decoder, next_logits
from ternary_ssm.layers import TernaryLinear
from ternary_ssm.sampling import SamplingConfig

BATCHES = {"cuda": [1, 2, 4, 8, 16, 32, 64, 128, 256], "cpu": [1, 8]}
PREFILLS = {"cuda": [(1, 512), (1, 2048), (1, 8192), (8, 2048)], "cpu": [(1, 512)]}
VOCAB = 50277
# (bench, batch, length, state dtype, mode) -> the calls to time, the dtype that the states have
Build = Callable[[str, int, int, torch.dtype, str], tuple[list[Callable[[], Any]], torch.dtype]]


def config_of(name: str) -> MambaConfig:
    layer, d_model, n_layer = MODELS[name]
    return MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=VOCAB, ssm_cfg={"layer": layer})


@torch.no_grad()
def random_model(config: MambaConfig, ternary: TernaryConfig, device: str, dtype: torch.dtype) -> MambaLM:
    """A packed model whose activations stay moderate; no weight is ever dense."""
    model = MambaLM(config, ternary, "meta", dtype).to_empty(device=device).eval()
    fields = torch.tensor([0, 1, 3], dtype=torch.uint8, device=device)  # 00, 01, 11
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.uint8:
            codes = [fields[torch.randint(3, tensor.shape, device=device)] << 2 * i for i in range(4)]
            tensor.copy_(codes[0] | codes[1] | codes[2] | codes[3])
        elif tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        elif name.endswith("weight_scale"):
            table = "embeddings" in name or "lm_head" in name
            value = 64 if ternary.embedding == "int8" else 1  # about what the scale is multiplied with
            tensor.fill_(0.02 / value if table else config.d_model**-0.5)
        elif name.endswith("A_log"):
            tensor.uniform_(1, 16).log_()
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            tensor.uniform_(-6, -3)
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor.fill_(1)
        elif tensor.dim() > 1 and "conv1d" not in name:
            tensor.normal_(std=tensor.shape[1] ** -0.5)
        else:
            tensor.uniform_(-0.5, 0.5)
    return model


def ours(model: MambaLM, device: str) -> Build:
    runner = graphs.Runner(model) if device == "cuda" else None

    def build(bench, batch, length, state_dtype, mode):
        cache = model.empty_cache(batch, state_dtype)
        if bench == "decode" and mode == "graph":
            loop = graphs.Loop(runner, model, batch, SamplingConfig())
            loop.cache = cache
            return [lambda: loop.advance(model)], state_dtype
        ids = torch.randint(VOCAB, (batch, length), device=device)
        if bench == "prefill" and device == "cuda":
            prefill = graphs.Prefill(runner.decoder, batch * length, cache)
            prefill.ids.copy_(ids.view(1, -1))
            prefill.bounds.copy_(torch.arange(batch + 1) * length)
            return [lambda: prefill.run(model).argmax(-1)], state_dtype
        if bench == "decode" and device == "cpu":
            decoder = Decoder(model) if Decoder.supports(model, batch) else None
            return [lambda: next_logits(model, decoder, ids[:, 0], cache).argmax(-1)], state_dtype
        return [lambda: model(ids, cache, last_only=True).logits.argmax(-1)], state_dtype

    return build


def mamba_ssm(name: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Build]:
    from mamba_ssm.models.config_mamba import MambaConfig as Config
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.utils.generation import InferenceParams

    layer, d_model, n_layer = MODELS[name]
    config = Config(d_model=d_model, n_layer=n_layer, vocab_size=VOCAB, ssm_cfg={"layer": layer})
    model = MambaLMHeadModel(config, device=device, dtype=dtype).eval()

    def build(bench, batch, length, state_dtype, mode):
        params = InferenceParams(max_seqlen=length + 1, max_batch_size=batch)
        states = model.allocate_inference_cache(batch, length + 1)
        params.key_value_memory_dict = {i: (conv, ssm.to(state_dtype)) for i, (conv, ssm) in states.items()}
        params.seqlen_offset = 1 if bench == "decode" else 0
        ids = torch.randint(VOCAB, (batch, length), device=device)
        step = lambda: model(ids, inference_params=params, num_last_tokens=1).logits.argmax(-1)  # noqa: E731
        return [step], state_dtype

    return model, build


def llama_cpp(model: MambaLM, directory: str) -> Build:
    import llama_cpp as library
    from llama_cpp._logger import set_verbose
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = Path(directory) / "model.gguf"
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]  # llama.cpp wants a merge
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(letters)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path.with_name("tokenizer.json")))
    gguf.write(path, model.config, model.ternary, model.state_dict(), path.parent, "tq2_0")
    small = path.with_name("small.gguf")  # its own choice of the head's type, Q6_K; the rest is copied
    set_verbose(False)
    wish = library.llama_model_quantize_default_params()
    wish.ftype = library.LLAMA_FTYPE_MOSTLY_TQ2_0
    if library.llama_model_quantize(str(path).encode(), str(small).encode(), wish):
        raise RuntimeError("llama_model_quantize failed")
    threads = torch.get_num_threads()
    options = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
    llama = library.Llama(str(small), n_ctx=8192, n_batch=512, n_ubatch=512, **options)

    def build(bench, batch, length, state_dtype, mode):
        if batch > 1:
            raise NotImplementedError("one sequence alone")
        llama.reset()

        def run() -> None:
            if bench == "prefill" or llama.n_tokens > 8000:
                llama.reset()
            llama.eval([7] * length)

        return [run], torch.float32

    return build


def work(model: nn.Module, config: MambaConfig, bench: str, batch: int, length: int, state: int, conv: int):
    """Bytes and flops of the floor; `state` and `conv`: bytes of an element."""
    tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    per_row = math.prod(config.state_shape(1)) * state + (config.d_conv - 1) * config.conv_channels * conv
    states = batch * config.n_layer * per_row * (2 if bench == "decode" else 1)
    projections = config.n_layer * config.d_model * (config.in_proj_rows + config.d_inner)
    head = config.d_model * config.padded_vocab_size
    return sum(tensors.values()) + states, 2 * batch * (length * projections + head)


def implementations(args: argparse.Namespace, name: str) -> list[tuple[str, str, Callable]]:
    """(library, head's dtype, what makes the model and `build`)."""
    dtype, config = DTYPES[args.dtype], config_of(name)

    def make_ours(head: str) -> tuple[nn.Module, Build]:
        ternary = TernaryConfig(group_size=args.group_size, embedding=head)
        model = random_model(config, ternary, args.device, dtype)
        for layer in model.modules():
            if isinstance(layer, TernaryLinear):
                layer.activations = args.activations
        return model, ours(model, args.device)

    def make_llama_cpp() -> tuple[nn.Module, Build]:
        model = random_model(config, TernaryConfig(group_size=gguf.BLOCK), "cpu", torch.float16)
        with tempfile.TemporaryDirectory() as directory:
            return model, llama_cpp(model, directory)

    found = [
        ("ternary_ssm", args.dtype if head == "float" else head, partial(make_ours, head))
        for head in args.heads
    ]
    if args.peers and args.device == "cuda":
        found.append(("mamba_ssm", args.dtype, partial(mamba_ssm, name, args.device, dtype)))
    elif args.peers and args.group_size == gguf.BLOCK:
        found.append(("llama.cpp", "q6_k", make_llama_cpp))
    return found


def cases(args: argparse.Namespace) -> Iterator[tuple[str, int, int, torch.dtype, str]]:
    """What `build` takes."""
    shapes = [("decode", batch, 1) for batch in args.batches if "decode" in args.bench]
    shapes += [("prefill", *shape) for shape in PREFILLS[args.device] if "prefill" in args.bench]
    for bench, batch, length in shapes:
        for state in args.states if bench == "decode" else ["fp32"]:
            for mode in ["graph", "eager"] if args.device == "cuda" else ["eager"]:
                yield bench, batch, length, DTYPES[state], mode


def bench_model(args: argparse.Namespace, name: str, limits: tuple[float, float]) -> Iterator[Record]:
    found = implementations(args, name)
    # A GPU has one at a time: its memory is counted. Those of a CPU take turns.
    for group in [found] if args.device == "cpu" else [[one] for one in found]:
        yield from bench_group(args, name, group, limits)
        gc.collect()


@torch.inference_mode()
def bench_group(
    args: argparse.Namespace, name: str, group: list[tuple[str, str, Callable]], limits: tuple[float, float]
) -> Iterator[Record]:
    config, made = config_of(name), []
    for impl, head, make in group:
        try:
            made.append((impl, head, *make()))
        except ImportError as error:
            print(f"{error.name}: not installed")
    for case in cases(args):
        for (impl, head, model, _), state, times in time_group(args, name, made, case):
            bench, batch, length, _, mode = case
            sizes = state.itemsize, DTYPES[args.dtype].itemsize
            floor = floor_ms(*work(model, config, bench, batch, length, *sizes), args.device, limits)
            rounded = impl == "ternary_ssm" and args.activations != "a16"
            types = name_of(state), head, args.activations if rounded else args.dtype
            record = Record(bench, impl, mode, name, batch, length, *types, *times, floor)
            show(record)
            yield record


def time_group(args: argparse.Namespace, name: str, group: list[tuple], case: tuple) -> list[tuple]:
    """(one of the group, its states' dtype, its times) of all that run this case."""
    bench, batch, _, _, mode = case
    built = []
    for one in group:
        try:
            run, state = one[-1](*case)
            built.append((one, state, run if args.device == "cpu" else measure(run, mode, args.device)))
        except Exception as error:  # a peer's, or of memory: a refusal is a result too
            if one[0] == "ternary_ssm" and not isinstance(error, torch.OutOfMemoryError):
                raise
            print(f"{bench} {name} {one[0]} {mode} b {batch}: {type(error).__name__} {error}"[:110])
    if args.device == "cuda":
        return built
    times = measure_in_turn([run for _, _, run in built])
    return [(one, state, t) for (one, state, _), t in zip(built, times, strict=True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=comma_list(), help="names or parts of them: " + ", ".join(MODELS))
    parser.add_argument("--bench", type=comma_list(), default=["decode", "prefill"], help="decode,prefill")
    parser.add_argument("--batches", type=comma_list(int), help="of decoding")
    parser.add_argument(
        "--states", type=comma_list(), default=["fp32"], help="dtypes of the state: fp32,bf16"
    )
    parser.add_argument("--heads", type=comma_list(), default=["float"], help="of float,int8,ternary")
    parser.add_argument("--dtype", choices=DTYPES, help="of activations and head (fp16; on the CPU fp32)")
    parser.add_argument("--activations", default="a16", help="of ternary layers: a16, a8 (CPU), fp8 (GPU)")
    parser.add_argument("--group-size", type=int, help="128; on the CPU 256, llama.cpp's")


def run(args: argparse.Namespace) -> None:
    on_gpu = args.device == "cuda"
    args.batches = args.batches or BATCHES[args.device]
    args.dtype = args.dtype or ("fp16" if on_gpu else "fp32")
    args.group_size = args.group_size or (128 if on_gpu else gguf.BLOCK)
    models = chosen_models(args.models or (list(MODELS) if on_gpu else ["130m"]))
    head, limits = begin(args)
    write(args, head, (record for name in models for record in bench_model(args, name, limits)))
