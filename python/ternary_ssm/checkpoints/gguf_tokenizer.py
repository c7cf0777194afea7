"""tokenizer.json of a byte-level BPE -> the tokenizer's keys of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..config import MambaConfig
from .files import CheckpointError, read_json, reading

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens


def token_keys(path: Path, config: MambaConfig) -> list[tuple[str, Any]]:
    """(GGUFWriter's method, value). A token for each row of the embedding: those of padding are unused."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected the model's tokenizer: llama.cpp needs it")
    values = read_json(path)
    with reading(path):
        _check_splitting(path, values)
        bpe, added = values["model"], {token["id"]: token for token in values.get("added_tokens") or []}
        texts = {id: text for text, id in bpe["vocab"].items()} | {
            id: t["content"] for id, t in added.items()
        }
        rows = config.padded_vocab_size
        if texts and max(texts) >= rows:
            raise CheckpointError(f"{path}: has the token id {max(texts)}, the model's last is {rows - 1}")
        kinds = {id: NORMAL for id in texts}
        kinds |= {id: CONTROL if token["special"] else USER_DEFINED for id, token in added.items()}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
        tokenizer = Tokenizer.from_file(str(path))
        eos = next(iter(config.end_ids), None)
        eos = tokenizer.token_to_id("<|endoftext|>") if eos is None else eos
        if eos is None:  # llama.cpp would end texts at token 11
            raise CheckpointError(f"{path}: has no <|endoftext|>, expected it or eos_token_id in config.json")
        bos = eos if config.bos_token_id is None else config.bos_token_id
        if (prefix := tokenizer.encode("").ids) not in ([], [bos]):
            raise CheckpointError(f"{path}: adds the tokens {prefix} to texts, expected none or [{bos}]")
    keys = [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", "gpt-2"),
        ("add_token_list", [texts.get(id, f"[PAD{id}]") for id in range(rows)]),
        ("add_token_types", [kinds.get(id, UNUSED) for id in range(rows)]),
        ("add_token_merges", merges),
        ("add_bos_token_id", bos),
        ("add_eos_token_id", eos),
        ("add_add_bos_token", prefix == [bos]),
    ]
    return keys + [("add_pad_token_id", config.pad_token_id)] * (config.pad_token_id is not None)


def _check_splitting(path: Path, values: dict[str, Any]) -> None:
    """Text must be split into words as GPT-2 does: the one rule of llama.cpp's that is written here."""
    pre, kind = values.get("pre_tokenizer") or {}, (values.get("model") or {}).get("type")
    splits = {key: pre.get(key) for key in ("type", "add_prefix_space", "use_regex")}
    splits["use_regex"] = pre.get("use_regex", True)  # tokenizers from before the flag
    expected = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if kind != "BPE" or splits != expected:
        raise CheckpointError(f"{path}: is a {kind} with {splits}, expected a BPE with {expected}")
    if (normalizer := (values.get("normalizer") or {"type": "NFC"})["type"]) != "NFC":  # GPT-NeoX has NFC
        raise CheckpointError(f"{path}: has the normalizer {normalizer}, expected none or NFC")
