"""Trains the byte-level BPE tokenizer of the tiny English model.

    python recipes/tiny-english/tokenizer.py TEXT [TEXT ...] --out DIR

TEXT: .jsonl.bz2 files of {"text": ...} lines. Writes DIR/tokenizer.json with 8,192 tokens; id 0 is
<|endoftext|>, which stands between documents.
"""

import argparse
import bz2
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", nargs="+", type=Path)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--vocab-size", type=int, default=8192)
args = parser.parse_args()

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=args.vocab_size,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)
documents = (json.loads(line)["text"] for path in args.text for line in bz2.open(path, "rt"))
tokenizer.train_from_iterator(documents, trainer)
args.out.mkdir(parents=True, exist_ok=True)
tokenizer.save(str(args.out / "tokenizer.json"))
print(f"{args.out / 'tokenizer.json'}: {tokenizer.get_vocab_size()} tokens")
