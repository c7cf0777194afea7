"""Broken and hostile GGUF files are refused in words, and never crash."""

import dataclasses
import math
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from ternary_ssm import MambaLM, TernaryConfig
from ternary_ssm.checkpoints import CheckpointError
from test_broken_checkpoints import EDITS, damaged_bytes, loads_or_is_refused
from test_checkpoints import make
from test_gguf import MAMBA2, export, write_tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, bytes, int]:
    """A file with all types of tensors, its bytes, and where its tensors begin."""
    config = dataclasses.replace(MAMBA2, n_layer=1)
    model = make(config, TernaryConfig(group_size="tensor", scale_dtype="float32"))
    directory = write_tokenizer(tmp_path_factory.mktemp("small"))
    path = export(model, directory / "m.gguf", directory)
    return path, path.read_bytes(), gguf.GGUFReader(path).data_offset


def put(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # never over a file that is mapped
    path.write_bytes(data)


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([(b"GGUF", b"GGUX")], "starts with b'GGUX', version 3"),
        ([(b"GGUF\3", b"GGUF\1")], "version 1, expected b'GGUF', version 2 or 3"),
        ([(b"\6\0\0\0\0\0\0\0mamba2", b"\6\0\0\0\0\0\0\0llamas")], "architecture is 'llamas'"),
        ([(b"ssm.state_size", b"ssm.xxxxx_size")], "mamba2.ssm.state_size is None"),
        ([(b"block_count", b"block_xxxxx")], "mamba2.block_count is None, expected a positive integer"),
        ([(b"blk.0.ssm_norm", b"blk.0.ssm_nrom")], "unexpected tensors blk.0.ssm_nrom.weight"),
        ([(b"blk.0.ssm_norm", b"blk.0.ssm_conv")], "unexpected tensors"),
        ([(b"blk.0.ssm_a", b"blk.0.ssm_d")], "ssm_d has 2 dimensions or is there twice"),
        ([(b"token_embd", b"token_embx")], "no tensor token_embd.weight"),
        ([(b"blk.0.ssm_in.scale", b"blk.0.ssm_nn.scale")], "blk.0.ssm_nn.scale belongs to no ternary weight"),
    ],
)
def test_hostile_headers(changes, words, small):
    path, good, _ = small
    data = good
    for old, new in changes:
        assert old in data
        data = data.replace(old, new, 1)
    put(path, data)
    with pytest.raises(CheckpointError, match=words) as error:
        MambaLM.from_pretrained(path)
    assert "m.gguf" in str(error.value)


def test_hostile_sizes(small):
    path, good, start = small
    counts = struct.Struct("<QQ")
    tensors, keys = counts.unpack_from(good, 8)
    huge = 2**63
    many = key("x", 9, struct.pack("<IQ", 0, huge)), key("y", 9, struct.pack("<IQ", 8, huge))
    deep = key("z", 9, struct.pack("<IQ", 9, 1) * 3)
    for data, words in (
        (b"", "empty"),
        (good[:20], "ends at byte 20, expected 24 bytes from 0 on"),
        (good[: start - 70], "ends at byte"),
        (good[:-1], "expected whole blocks"),
        (good[:8] + counts.pack(huge, keys) + good[24:], "m.gguf: "),
        (good[:8] + counts.pack(tensors, huge) + good[24:], "m.gguf: "),
        (good[:8] + counts.pack(tensors, keys + 1) + many[0] + good[24:], "ends at byte"),
        (good[:8] + counts.pack(tensors, keys + 1) + many[1] + good[24:], "ends at byte"),
        (good[:8] + counts.pack(tensors, keys + 1) + deep + good[24:], "value of type 9"),
        (
            good[:8] + counts.pack(tensors, keys + 1) + key("general.alignment", 4, b"\0\0\0\0") + good[24:],
            "general.alignment is 0, expected a multiple of 8",
        ),
    ):
        put(path, data)
        with pytest.raises(CheckpointError, match=words):
            MambaLM.from_pretrained(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        MambaLM.from_pretrained(path)


def edited(path: Path, tensor: str, at: int, value: bytes, good: bytes) -> None:
    put(path, good)
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor)
    data = bytearray(good)
    data[found.data_offset + at : found.data_offset + at + len(value)] = value
    put(path, bytes(data))


def test_hostile_values(small):
    path, good, _ = small
    nan = struct.pack("<f", math.nan)
    for tensor, at, value, words in (
        ("blk.0.ssm_in.weight", 5, b"\xff", "in_proj.weight has the code 3 in a TQ2_0 block"),
        ("blk.0.ssm_in.weight", 64, b"\0\xfc", "in_proj.weight_scale has .*expected finite scales from 0"),
        ("blk.0.ssm_in.scale", 0, nan, "in_proj.weight_scale has .*nan"),
        ("blk.0.ssm_a", 0, nan, "A_log comes from values that are not below 0 and finite"),
        ("blk.0.ssm_a", 0, struct.pack("<f", 0.5), "A_log comes from values"),
    ):
        edited(path, tensor, at, value, good)
        with pytest.raises(CheckpointError, match=words):
            MambaLM.from_pretrained(path)


@pytest.mark.parametrize("header_only", [True, False])
def test_damaged_bytes(header_only, small):
    path, good, start = small

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(EDITS)
    def damage(edits):
        put(path, damaged_bytes(good, edits, start if header_only else len(good)))
        loads_or_is_refused(path)

    damage()
    put(path, good)
    loads_or_is_refused(path)


@pytest.mark.parametrize("kind", [7, 2**32 - 1, 0])
@pytest.mark.parametrize("size", [0, 1, 255, 2**31, 2**62, 2**64 - 1])
def test_hostile_tensor_infos(kind, size, small):
    """Any shape, type and offset of a tensor is refused or fits."""
    path, good, _ = small
    name = b"blk.0.ssm_out.weight"
    at = good.index(name) + len(name)
    for offset, layout in ((4, "<Q"), (12, "<Q"), (20, "<I"), (24, "<Q")):
        data = bytearray(good)
        struct.pack_into(layout, data, at + offset, kind if layout == "<I" else size)
        put(path, bytes(data))
        loads_or_is_refused(path)
