import bz2
import gzip
import json
import lzma
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from ternary_ssm import data
from ternary_ssm.data import DataError, TokenStream, load_tokens, sequence_bounds

WORDS = ["<|endoftext|>", "<unk>", *(f"w{i}" for i in range(8))]
EOS, VOCAB = 0, len(WORDS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.enable_truncation(2)  # as some published tokenizer.json do: must not cut the data
    t.enable_padding(length=9, pad_token="<unk>", pad_id=1)
    t.save(str(path))
    return path


def write(path, content: bytes):
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(content)
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz"])
def test_text(tmp_path, tokenizer, ending):
    lines = [json.dumps({"text": "w0 w1\nw2 w3"}), "", json.dumps({"text": "w7", "id": 3})]
    jsonl = write(tmp_path / f"a.jsonl{ending}", "\n".join(lines).encode())
    tokens = load_tokens(jsonl, VOCAB, tokenizer)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [2, 3, 4, 5, EOS, 9, EOS]
    txt = write(tmp_path / f"a.txt{ending}", b"w0 w1\n\nw2\n")
    assert load_tokens(txt, VOCAB, tokenizer).tolist() == [2, 3, 4, EOS]
    assert load_tokens(txt, VOCAB, tokenizer, eos_token_id=5).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(("piece", "batch"), [(1, 1), (7, 20), (1 << 18, 1)])
def test_long_text_in_pieces_is_one_document(tmp_path, tokenizer, monkeypatch, piece, batch):
    monkeypatch.setattr(data, "_PIECE", piece)
    monkeypatch.setattr(data, "_BATCH", batch)
    path = write(tmp_path / "a.txt", b"".join(b"w%d w%d\n" % (i % 8, i % 3) for i in range(50)))
    expected = [2 + j for i in range(50) for j in (i % 8, i % 3)] + [EOS]
    assert load_tokens(path, VOCAB, tokenizer).tolist() == expected


@pytest.mark.parametrize(("vocab", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_token_files_are_mapped(tmp_path, vocab, dtype):
    tokens = np.arange(100, dtype=dtype) + (vocab - 100)
    tokens.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", tokens)
    for name in ("a.bin", "a.npy"):
        found = load_tokens(tmp_path / name, vocab)
        assert isinstance(found, np.memmap)
        assert found.dtype == dtype
        assert np.array_equal(found, tokens)


BAD_FILES = {
    "empty": ("a.txt", b"", "a.txt: is empty"),
    "only blank lines": ("a.jsonl", b"\n \n", "holds no tokens"),
    "kind": ("a.csv", b"1,2", "expected .npy, .bin, .txt, .jsonl"),
    "compressed tokens": ("a.npy.gz", b"1", "expected .npy"),
    "not UTF-8": ("a.txt", b"w0\n\xff\xfe\n", "line 2: cannot be read ('utf-8'"),
    "not JSON": ("a.jsonl", b'{"text": "w0"}\n{"text": \n', "line 2: expected {"),
    "no text": ("a.jsonl", b'{"content": "w0"}', "line 1: expected {"),
    "text a number": ("a.jsonl", b'{"text": 5}', "line 1: expected {"),
    "a list": ("a.jsonl", b"[1]", "line 1: expected {"),
    "lone surrogate": ("a.jsonl", b'{"text": "\\ud800"}', "line 1: expected {"),
    "not npy": ("a.npy", b"nonsense, not NumPy's", "not a whole file of tokens"),
    "odd bytes": ("a.bin", b"123", "not a whole file of tokens"),
    "id too large": ("a.bin", np.array([1, 2, VOCAB], "<u2").tobytes(), "token 2 is 10, expected 0 to 9"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named(tmp_path, tokenizer, name, content, message):
    with pytest.raises(DataError) as error:
        load_tokens(write(tmp_path / name, content), VOCAB, tokenizer)
    assert message in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
def test_truncated_archives_are_refused(tmp_path, tokenizer, ending):
    path = write(tmp_path / f"a.txt.{ending}", b"w1 w2\n" * 5000)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        load_tokens(path, VOCAB, tokenizer)
    path.write_bytes(b"not an archive")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokens(path, VOCAB, tokenizer)


def test_bad_arrays_and_missing_things(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no such file"):
        load_tokens(tmp_path / "a.txt", VOCAB, tokenizer)
    with pytest.raises(DataError, match="no such file"):
        load_tokens(tmp_path, VOCAB, tokenizer)
    text = write(tmp_path / "b.txt", b"w0")
    with pytest.raises(DataError, match=r"needs a tokenizer\.json"):
        load_tokens(text, VOCAB, tmp_path / "none.json")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no <\|endoftext\|>"):
        load_tokens(text, VOCAB, tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="token 0 is"):
        load_tokens(text, 2, tokenizer)
    for array in (np.zeros((2, 2), int), np.zeros(3), np.array([1, -1])):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(DataError, match=r"expected integers \[n\]|token 1 is -1"):
            load_tokens(tmp_path / "a.npy", VOCAB)
    np.save(tmp_path / "a.npy", np.zeros(0, np.uint16))
    with pytest.raises(DataError):
        load_tokens(tmp_path / "a.npy", VOCAB)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(2, 200), length=st.integers(1, 20), batch=st.integers(1, 9), seed=st.integers(0, 2**32 - 1)
)
def test_an_epoch_covers_every_window_once(n, length, batch, seed):
    tokens = np.arange(n, dtype=np.uint16)
    if n <= length:
        with pytest.raises(DataError, match=f"expected at least {length + 1}"):
            TokenStream(tokens, length, batch, seed)
        return
    stream = TokenStream(tokens, length, batch, seed)
    windows = stream.windows_per_epoch
    steps = -(-2 * windows // batch)
    order = [w for step in range(steps) for w in stream.windows(step)]
    assert sorted(order[:windows]) == list(range(windows))
    assert sorted(order[windows : 2 * windows]) == list(range(windows))
    labels = torch.cat([stream.batch(step)[:, 1:] for step in range(steps)]).flatten()[: windows * length]
    assert labels.sort().values.tolist() == list(range(1, windows * length + 1))  # each token predicted once
    # A stream asked for one step alone gives what the one asked for all steps gave.
    again = TokenStream(tokens.astype(np.uint32), length, batch, seed)
    assert torch.equal(again.batch(steps - 1), stream.batch(steps - 1))


def test_order_depends_on_seed_and_epoch_and_is_fixed():
    tokens = np.arange(101, dtype=np.uint16)
    first = TokenStream(tokens, 10, 10, seed=0)
    assert first.windows(0) != first.windows(1)  # two epochs
    assert first.windows(0) != TokenStream(tokens, 10, 10, seed=1).windows(0)
    assert first.windows(0) == [3, 7, 6, 4, 1, 0, 2, 8, 5, 9]  # or runs begun before could not be resumed
    batch = first.batch(0)
    assert batch.dtype == torch.int64
    assert batch[0].tolist() == list(range(first.windows(0)[0] * 10, first.windows(0)[0] * 10 + 11))


def test_fingerprint_sees_values_not_storage():
    tokens = np.arange(50, dtype=np.uint16)
    name = TokenStream(tokens, 4, 1).fingerprint()
    assert name == TokenStream(tokens.astype(np.int64), 4, 1).fingerprint()
    tokens[49] = 0
    assert name != TokenStream(tokens, 4, 1).fingerprint()


# --- data sets ----------------------------------------------------------------------------------------------

TEXTS = ["w0 w1", "", "w2", *(f"w{i % 8}" for i in range(3000))]  # more than one batch of rows
IDS = [t for text in TEXTS for t in [*(2 + int(w[1:]) for w in text.split()), EOS]]


def write_parquet(path, texts, column="text"):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"id": range(len(texts)), column: pa.array(texts, pa.string())})
    parquet.write_table(table, path, row_group_size=700)
    return path


def test_parquet(tmp_path, tokenizer, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    assert load_tokens(path, VOCAB, tokenizer).tolist() == IDS
    bad = [
        (
            write_parquet(tmp_path / "b.parquet", ["w0"], "content"),
            r"b\.parquet: expected a column .text., found",
        ),
        (write_parquet(tmp_path / "c.parquet", ["w0", None]), r"c\.parquet, row 1: expected a text"),
        (write(tmp_path / "d.parquet", b"PAR1 nonsense PAR1"), r"d\.parquet: cannot be read"),
        (write(tmp_path / "e.parquet.gz", b"PAR1"), r"e\.parquet\.gz: expected \.npy"),
    ]
    for file, message in bad:
        with pytest.raises(DataError, match=message):
            load_tokens(file, VOCAB, tokenizer)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'ternary-ssm\[data\]'"):
        load_tokens(path, VOCAB, tokenizer)


def test_directory_of_files_in_the_order_of_their_names(tmp_path, tokenizer):
    write_parquet(tmp_path / "b.parquet", ["w3"])
    write(tmp_path / "a.jsonl.gz", b'{"text": "w1"}')
    write(tmp_path / "c.txt", b"w5 w6")
    write(tmp_path / "README.md", b"w7")
    assert load_tokens(tmp_path, VOCAB, tokenizer).tolist() == [3, EOS, 5, EOS, 7, 8, EOS]
    write(tmp_path / "d.jsonl", b"{}")
    with pytest.raises(DataError, match=r"d\.jsonl, line 1"):
        load_tokens(tmp_path, VOCAB, tokenizer)


def test_saved_data_sets(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        assert load_tokens(tmp_path / name, VOCAB, tokenizer).tolist() == IDS


def test_hub_data_sets_are_streamed_up_to_the_limit(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "_BATCH", 10)
    asked, read = [], []

    def load_dataset(*args, **options):
        asked.append((args, options["split"], options["streaming"]))
        return (read.append(i) or {"text": f"w{i % 8} w0"} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    names = {"hf:a/b": (None, "train"), "hf:a/b:test": (None, "test"), "hf:a/b:en:test": ("en", "test")}
    for name, (config, split) in names.items():
        read.clear()
        assert load_tokens(name, VOCAB, tokenizer, limit=7).tolist() == [2, 2, EOS, 3, 2, EOS, 4]
        assert asked[-1] == (("a/b", config), split, True) and len(read) < 10
    for name in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(DataError, match="expected hf:NAME"):
            load_tokens(name, VOCAB, tokenizer)
    fake = SimpleNamespace(load_dataset=lambda *a, **k: iter([{"body": "w0"}]))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(DataError, match=r"hf:a, row 0: expected a text in .text., found columns \['body'\]"):
        load_tokens("hf:a", VOCAB, tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hf:a: needs datasets: pip install 'ternary-ssm\[data\]'"):
        load_tokens("hf:a", VOCAB, tokenizer)


def test_hub_data_set_that_cannot_be_reached(tokenizer, monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"hf:a: cannot be read \(no network\)"):
        load_tokens("hf:a", VOCAB, tokenizer)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_sequences_end_with_rows_and_documents(b, l, seed):
    ids = torch.from_numpy(np.random.RandomState(seed).randint(0, 4, (b, l)))
    bounds = sequence_bounds(ids, (1, 3)).tolist()
    flat, expected = ids.flatten().tolist(), [0]
    for i, token in enumerate(flat):
        if token in (1, 3) or (i + 1) % l == 0:
            expected.append(i + 1)
    assert bounds == expected
