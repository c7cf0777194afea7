"""Directories of models: what is saved is what is loaded, and an interrupted save is no mixture."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ternary_ssm import MambaConfig, MambaLM, TernaryConfig, pack_, quantize_
from ternary_ssm.checkpoints import CheckpointError, files

MAMBA1 = MambaConfig(d_model=32, n_layer=2, vocab_size=50, ssm_cfg={"layer": "Mamba1", "d_state": 4})
MAMBA2 = MambaConfig(d_model=32, n_layer=2, vocab_size=50, ssm_cfg={"headdim": 8, "d_state": 16})
TERNARY = TernaryConfig(group_size=32)
KINDS = {
    "dense": None,
    "packed": TERNARY,
    "row": TernaryConfig(group_size="row", scale_dtype="bfloat16"),
    "tensor": TernaryConfig(group_size="tensor", scale_dtype="float32", embedding="int8"),
    "int8": TernaryConfig(group_size=32, embedding="int8"),
    "ternary": TernaryConfig(group_size=32, embedding="ternary"),
}
# Models that transformers has no words for.
FOREIGN = [
    {"rms_norm": False},
    {"ssm_cfg": {"headdim": 8, "rmsnorm": False}},
    {"ssm_cfg": {"headdim": 8, "norm_before_gate": True}},
    {"ssm_cfg": {"headdim": 8, "D_has_hdim": True}},
    {"ssm_cfg": {"headdim": 8, "ngroups": 2, "norm_groups": 1, "dt_limit": (0.0, math.inf)}},
]


def make(config: MambaConfig = MAMBA2, ternary: TernaryConfig | None = None, seed: int = 0, dtype=None):
    torch.manual_seed(seed)
    model = MambaLM(config, dtype=dtype)
    return (model if ternary is None else pack_(model, ternary)).eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(directory: Path, **changes) -> None:
    """Keys have __ for the dots of a name; None removes the tensor."""
    tensors = load_file(directory / files.SINGLE)
    tensors |= {key.replace("__", "."): value for key, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / files.SINGLE, {"format": "pt"})


# Round trips


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [MAMBA1, MAMBA2], ids=["mamba1", "mamba2"])
def test_round_trip(config, kind, tied, tmp_path):
    config = dataclasses.replace(config, tie_embeddings=tied, eos_token_id=3, pad_vocab_size_multiple=16)
    model = make(config, KINDS[kind])
    model.save_pretrained(tmp_path)
    loaded = MambaLM.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.ternary == model.ternary and not loaded.training
    for name in (
        "vocab_size",
        "padded_vocab_size",
        "eos_token_id",
        "bos_token_id",
        "tie_embeddings",
        "dt_limit",
    ):
        if name != "dt_limit" or config.is_mamba2:
            assert getattr(loaded.config, name) == getattr(config, name)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    for file in (files.SINGLE, "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_packed_names_and_types(tmp_path):
    make(MAMBA2, KINDS["int8"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / files.SINGLE)
    layer = "backbone.layers.1.mixer.in_proj"
    assert tensors[f"{layer}.weight"].shape == (MAMBA2.in_proj_rows, 8)
    assert tensors[f"{layer}.weight"].dtype == torch.uint8
    assert tensors[f"{layer}.weight_scale"].dtype == torch.float16
    assert tensors["backbone.embeddings.weight"].dtype == torch.int8
    assert tensors["backbone.embeddings.weight_scale"].shape == (56, 1)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "ternary_ssm" and quantization["group_size"] == 32


@pytest.mark.parametrize("changes", FOREIGN)
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_what_transformers_cannot_describe(changes, kind, tmp_path):
    model = make(dataclasses.replace(MAMBA2, bos_token_id=1, **changes), KINDS[kind])
    model.save_pretrained(tmp_path)
    assert "d_model" in json.loads((tmp_path / "config.json").read_text())
    assert "backbone.embedding.weight" in load_file(tmp_path / files.SINGLE)
    loaded = MambaLM.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.config["norm_before_gate"] == model.config["norm_before_gate"]
    assert loaded.config.norm_groups == model.config.norm_groups and loaded.config.bos_token_id == 1


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["dense", "packed", "int8", "ternary"])
def test_dtypes(stored, kind, tmp_path):
    model = make(MAMBA2, KINDS[kind], dtype=stored)
    model.save_pretrained(tmp_path)
    assert MambaLM.from_pretrained(tmp_path).dtype == stored
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        loaded = MambaLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
        for name, before in model.state_dict().items():
            kept = name.endswith(("A_log", ".D", "dt_bias", "_scale")) or not before.is_floating_point()
            assert loaded[name].dtype == (before.dtype if kept else dtype), name
            assert torch.equal(loaded[name], before.to(loaded[name].dtype)), name


def test_mixed_dtypes_load_as_the_widest(tmp_path):
    make(dtype=torch.bfloat16).save_pretrained(tmp_path)
    weight = load_file(tmp_path / files.SINGLE)["backbone.norm_f.weight"]
    edit_tensors(tmp_path, backbone__norm_f__weight=weight.float())
    assert MambaLM.from_pretrained(tmp_path).dtype == torch.float32


def test_loading_maps_and_draws_nothing(tmp_path):
    make(MAMBA2, TERNARY).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    model = MambaLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / files.SINGLE) in maps.read_text()
    assert all(not t.is_meta for t in model.state_dict().values())
    assert model.backbone.norm_f.weight.requires_grad


def test_saving_over_the_files_in_use(tmp_path):
    make().save_pretrained(tmp_path)
    model = MambaLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert same(MambaLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # all readable to whom one is


def test_tokenizer_and_generation_settings_come_along(tmp_path):
    source = tmp_path / "source"
    make(dataclasses.replace(MAMBA2, eos_token_id=2, pad_token_id=1)).save_pretrained(source)
    assert json.loads((source / "generation_config.json").read_text()) == {
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("not the model's")
    edit_json(source / "generation_config.json", eos_token_id=[2, 5], top_k=7)
    model = MambaLM.from_pretrained(source)
    assert model.source == source
    for directory, options in (("a", {}), ("b", {"copy_from": source})):
        (model if directory == "a" else make()).save_pretrained(tmp_path / directory, **options)
        assert (tmp_path / directory / "tokenizer.json").read_text() == "{}"
        assert not (tmp_path / directory / "README.md").exists()
        generation = json.loads((tmp_path / directory / "generation_config.json").read_text())
        assert generation == {"eos_token_id": [2, 5], "pad_token_id": 1, "top_k": 7}


def test_a_model_in_training_is_not_saved(tmp_path):
    model = quantize_(make(), TERNARY)
    with pytest.raises(CheckpointError, match=r"in quantization-aware training .*in_proj.*: pack_ it first"):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="on the meta device"):
        MambaLM(MAMBA2, device="meta").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    pack_(model).save_pretrained(tmp_path)
    assert same(MambaLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


# Shards


def test_shards(tmp_path):
    model = make()
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / files.INDEX).read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors" and len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert all((tmp_path / name).stat().st_size < 24_000 for name in shards)
    assert same(MambaLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
    for size, names in (
        (20_000, len(shards)),
        (10**9, 1),
        (20_000, len(shards)),
    ):  # old ones are cleared away
        model.save_pretrained(tmp_path, max_shard_bytes=size)
        assert len(list(tmp_path.glob("*.safetensors"))) == names
        assert (tmp_path / files.INDEX).exists() == (names > 1)
        assert same(MambaLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b", "..", "", 5, None, "a\\b", "\0"]
)
def test_an_index_cannot_leave_its_directory(file, tmp_path):
    make().save_pretrained(tmp_path / "x", max_shard_bytes=20_000)
    make().save_pretrained(tmp_path)
    index = tmp_path / "x" / files.INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"backbone.norm_f.weight": file})
    with pytest.raises(
        CheckpointError, match=r"backbone.norm_f.weight is in .*, expected the name of a file"
    ):
        MambaLM.from_pretrained(tmp_path / "x")


def test_broken_indices(tmp_path):
    make().save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = tmp_path / files.INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    first = weight_map["backbone.embeddings.weight"]
    for change, words in (
        ({"backbone.norm_f.weight": first}, f"{first}: has no tensor backbone.norm_f.weight"),
        ({"extra": first}, f"{first}: has no tensor extra"),
        ({"backbone.norm_f.weight": "gone.safetensors"}, "gone.safetensors: no such file"),
    ):
        edit_json(index, weight_map=weight_map | change)
        with pytest.raises(CheckpointError, match=words):
            MambaLM.from_pretrained(tmp_path)
    for weight_map in (None, [], {}, "x"):
        edit_json(index, weight_map=weight_map)
        with pytest.raises(CheckpointError, match="weight_map is"):
            MambaLM.from_pretrained(tmp_path)


# Interrupted saves


class Killed(BaseException):
    """A process that dies: from the fuse's end on, nothing that touches the disk works any more."""


class Fuse:
    def __init__(self, monkeypatch, length: int) -> None:
        self.left = length
        for module, name in (
            (os, "replace"),
            (os, "unlink"),
            (os, "fsync"),
            (os, "mkdir"),
            (shutil, "rmtree"),
            (shutil, "copyfile"),
            (Path, "write_text"),
            (files, "save_file"),
        ):
            monkeypatch.setattr(module, name, self.burn(getattr(module, name)))

    def burn(self, function):
        def burning(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                if function is save_file:  # half of a file is on disk
                    Path(args[1]).write_bytes(b"\x08\0\0\0\0\0\0\0{")
                raise Killed
            return function(*args, **kwargs)

        return burning


BIG, SMALL = 10**9, 16_000  # one file, three


@pytest.mark.parametrize("config_changes", [False, True])
@pytest.mark.parametrize("shards", [(BIG, BIG), (BIG, SMALL), (SMALL, BIG), (SMALL, SMALL)])
def test_an_interrupted_save_is_no_mixture(shards, config_changes, tmp_path, monkeypatch):
    old = dataclasses.replace(MAMBA2, n_layer=1)
    new = dataclasses.replace(old, eos_token_id=5) if config_changes else old
    models = {"old": make(old, seed=1), "new": make(new, seed=2)}
    seen = []
    for length in range(200):
        directory = tmp_path / str(length)
        models["old"].save_pretrained(directory, max_shard_bytes=shards[0])
        with monkeypatch.context() as patch:
            Fuse(patch, length)
            try:
                models["new"].save_pretrained(directory, max_shard_bytes=shards[1])
                done = True
            except Killed:
                done = False
        try:
            loaded = MambaLM.from_pretrained(directory)
        except CheckpointError as error:
            assert config_changes and "config.json: no such file; " in str(error)
            seen.append("neither")
        else:
            (state,) = [n for n, m in models.items() if same(loaded.state_dict(), m.state_dict())]
            eos = models[state].config.eos_token_id
            assert loaded.config.eos_token_id == eos
            generation = json.loads((directory / "generation_config.json").read_text())
            assert generation.get("eos_token_id") == eos
            seen.append(state)
        models["new"].save_pretrained(
            directory, max_shard_bytes=shards[1]
        )  # the next save repairs everything
        assert same(MambaLM.from_pretrained(directory).state_dict(), models["new"].state_dict())
        if done:
            break
        shutil.rmtree(directory)
    assert done and seen == sorted(seen, key=["old", "neither", "new"].index) and {"old", "new"} <= set(seen)


def test_a_failed_save_leaves_no_litter(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(
        files, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        make(seed=1).save_pretrained(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


# Real sizes


@pytest.mark.slow
@pytest.mark.parametrize(("embedding", "limit"), [("float", 540e6), ("int8", 437e6), ("ternary", 361e6)])
def test_size_of_the_1_3b_model(embedding, limit, tmp_path):
    config = MambaConfig(d_model=2048, n_layer=48, vocab_size=50277, pad_vocab_size_multiple=16)
    model = MambaLM(config, TernaryConfig(embedding=embedding), "meta", torch.float16)
    model.load_state_dict(
        {n: torch.zeros_like(t, device="cpu") for n, t in model.state_dict().items()}, assign=True
    )
    model.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    assert same(MambaLM.from_pretrained(tmp_path).state_dict(), model.state_dict())
