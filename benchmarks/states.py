"""What 16-bit states cost, and whether decoding drifts from the whole-sequence path.

    python benchmarks/states.py [--model DIR] [--text FILE] [--length 4096] [--batch 8] [--dtype fp32]
                                [--device cuda|cpu] [--out FILE]

The tiny English student decodes text, each step given the text's own token, with states of every dtype. Its
loss, and the KL divergence from the logits that the whole sequence gives at once with fp32 states, over all
tokens and over the first and last sixteenth. Prints what it finds and writes a JSON file.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import DTYPES, begin, write

from ternary_ssm import MambaLM
from ternary_ssm.data import load_tokens
from ternary_ssm.decoder import Decoder, next_logits

ROOT = Path(__file__).parents[1]


@dataclass
class Record:
    state_dtype: str
    dtype: str  # of activations
    batch: int
    length: int
    nats: float  # a token
    whole_nats: float  # of the whole-sequence path
    kl: float  # nats a token
    kl_begin: float
    kl_end: float


@torch.inference_mode()
def records(args: argparse.Namespace) -> Iterator[Record]:
    model = MambaLM.from_pretrained(args.model, args.device, DTYPES[args.dtype])
    tokenizer, vocab = args.model / "tokenizer.json", model.config.vocab_size
    tokens = load_tokens(args.text, vocab, tokenizer, model.config.eos_token_id)
    need = args.batch * args.length + 1
    if len(tokens) < need:
        raise SystemExit(
            f"{args.text}: {len(tokens)} tokens, expected {need} for {args.batch} x {args.length}"
        )
    text = torch.from_numpy(tokens[:need].astype("int64")).to(args.device)
    ids, labels = text[:-1].view(args.batch, -1), text[1:].view(args.batch, -1)
    hidden = model.backbone(ids)
    decoder = Decoder(model) if Decoder.supports(model, args.batch) else None
    for state_dtype in ("fp32", "bf16", "fp16"):
        cache = model.empty_cache(args.batch, DTYPES[state_dtype])
        loss, whole_loss, kl = torch.zeros(3, args.length, args.batch, device=args.device)
        for i in range(args.length):
            whole = model.logits(hidden[:, i]).float().log_softmax(-1)
            step = next_logits(model, decoder, ids[:, i].contiguous(), cache).float().log_softmax(-1)
            loss[i] = F.nll_loss(step, labels[:, i], reduction="none")
            whole_loss[i] = F.nll_loss(whole, labels[:, i], reduction="none")
            kl[i] = F.kl_div(step, whole, reduction="none", log_target=True).sum(-1)
        part = max(1, args.length // 16)
        means = [v.double().mean().item() for v in (loss, whole_loss, kl, kl[:part], kl[-part:])]
        record = Record(state_dtype, args.dtype, args.batch, args.length, *means)
        print(record, flush=True)
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models/tiny-english/student")
    parser.add_argument("--text", type=Path, default=ROOT / "models/tiny-english/held_out.txt")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of activations")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=device)
    parser.add_argument("--out", type=Path, help="the JSON file (results/states-DEVICE-DATE.json)")
    args = parser.parse_args(namespace=argparse.Namespace(command="states"))
    head, _ = begin(args)
    write(args, head, records(args))


if __name__ == "__main__":
    main()
