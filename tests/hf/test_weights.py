"""Checkpoint folders, in and out: every bit comes back, and a damaged folder is refused before anything is read."""

import json
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxllm import load_hf, save_hf
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.generate.decode import Decoder
from jaxllm.hf import export, read_model
from jaxllm.hf.config import write_config
from jaxllm.hf.export import save
from jaxllm.models import FAMILIES
from tests.support.families import COMPUTED, draw_config, draw_params, mesh_layout, small_lm, write_checkpoint
from tests.support.side_files import side_files

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def their_shapes(config):
    """The names and shapes of transformers' own tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = write_config(FAMILIES[config.type], config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def make_folder(folder, config, dtype="float32", shards=1, without=(), norms=None) -> Path:
    """A checkpoint made without our code: random tensors under transformers' names, and files beside them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in their_shapes(config).items():
        kind = norms if norms and "norm" in name else dtype
        tensors[name] = rng.standard_normal(shape).astype(DTYPES[kind])
    if config.tie_word_embeddings:
        tensors[HEAD] = tensors[TABLE]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in without}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, {"format": "pt"})
        index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    raw = write_config(FAMILIES[config.type], config, dtype=dtype)
    (folder / "config.json").write_text(json.dumps({**raw, "transformers_version": "4.41.0"}))
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes(side_files()[name])
    (folder / "README.md").write_text("not for the export")
    return folder


def contents(folder):
    """Everything in a checkpoint folder in comparable form: tensors by file, as dtype and bytes; JSON parsed."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            found[path.name] = {n: (t.dtype.name, t.shape, t.tobytes()) for n, t in tensors.items()}
            with safe_open(path, "np") as file:
                assert file.metadata() == {"format": "pt"}
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
        else:
            found[path.name] = path.read_bytes()
    return found


@pytest.mark.parametrize(
    ("dtype", "shards", "tied", "without", "norms"),
    [
        ("float32", 1, False, (), None),
        ("bfloat16", 3, False, (), None),
        ("float16", 1, True, (HEAD,), None),
        ("bfloat16", 1, True, (TABLE,), None),
        ("float32", 2, True, (), None),
        ("bfloat16", 2, False, (), "float32"),
    ],
)
@pytest.mark.parametrize("name", COMPUTED)
def test_hf_to_us_to_hf_gives_back_every_bit(name, dtype, shards, tied, without, norms, tmp_path):
    config = draw_config(name, 4, tie_word_embeddings=tied)
    source = make_folder(tmp_path / "source", config, dtype, shards, without, norms)
    lm, params = load_hf(source)
    assert lm.config == config
    save_hf(lm, params, tmp_path / "made" / "export")
    before, after = contents(source), contents(tmp_path / "made" / "export")
    del before["README.md"]
    assert before == after
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["export"]


def test_buffers_of_early_files_are_dropped(tmp_path):
    config = draw_config("llama", 0)
    folder = make_folder(tmp_path / "source", config)
    tensors = load_file(folder / "model.safetensors")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file({**tensors, **buffer}, folder / "model.safetensors", {"format": "pt"})
    lm, params = load_hf(folder)
    save_hf(lm, params, tmp_path / "export")
    assert set(load_file(tmp_path / "export" / "model.safetensors")) == set(tensors)


def test_every_slice_goes_where_it_belongs(tmp_path):
    """On 8 devices the same numbers as on one; the rows that pad the vocabulary are zeros, and cut on the way out."""
    config = draw_config("llama", 0, vocab_size=61, num_attention_heads=8, num_key_value_heads=2)
    folder = make_folder(tmp_path / "source", config.model_copy(update={"tie_word_embeddings": False}))
    _, plain = load_hf(folder)
    lm, sharded = load_hf(folder, layout=mesh_layout(fsdp=2, tensor=4))
    assert lm.layout.rules["kv_heads"] == ()
    assert lm.vocab_padded == 64
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == lm.shardings()
    sharded, plain = tree.flatten(sharded), tree.flatten(plain)
    for path, axis in (("embed/table", 0), ("head/kernel", 1)):
        real, padding = np.split(np.asarray(sharded[path]), [61], axis)
        assert padding.shape[axis] == 3
        assert not padding.any()
        sharded[path] = real
    for path, leaf in plain.items():
        np.testing.assert_array_equal(sharded[path], leaf, err_msg=path)
    save_hf(lm, load_hf(folder, layout=lm.layout)[1], tmp_path / "export")
    assert contents(tmp_path / "export") == {k: v for k, v in contents(folder).items() if k != "README.md"}


def test_each_device_reads_its_own_slices_alone(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "m", draw_config("llama", 0, hidden_size=32, intermediate_size=64))
    lm = read_model(folder, mesh_layout(data=2, fsdp=4))
    sizes = []
    read = type(lm.source).read
    monkeypatch.setattr(type(lm.source), "read", lambda self, *args: sizes.append(part := read(self, *args)) or part)
    export_size = sum(np.prod(tensor.shape) for tensor in lm.source.tensors.values())
    from jaxllm.hf import load_params

    load_params(lm)
    # Replicas share what was read, so everything is read once; norms and biases that are not split are, too.
    assert sum(part.size for part in sizes) == export_size
    up = lm.config.hidden_size * lm.config.intermediate_size
    assert max(part.size for part in sizes if part.ndim == 2) <= max(up // 4, 97 * 48)


def test_dtypes_are_those_asked_for(tmp_path):
    folder = write_checkpoint(tmp_path / "m", draw_config("llama", 0), dtype="bfloat16")
    lm, params = load_hf(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert lm.compute_dtype == jnp.float32
    wide_lm, wide = load_hf(folder, param_dtype="float32", compute_dtype="bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float32), b), params, wide)
    assert wide_lm.compute_dtype == jnp.bfloat16
    save_hf(wide_lm, wide, tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {np.dtype("float32")}


def rewrite(path, change):
    """Writes a safetensors file again with `change(tensors)` applied."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_config(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


NORM, SHARD = "model.norm.weight", "model-00002-of-00003.safetensors"


def cut(folder):
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-100])


def pickles(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")


def foreign_dtype(folder):
    def change(tensors):
        tensors[NORM] = tensors[NORM].astype(np.int8)

    for path in folder.glob("*.safetensors"):
        if NORM in load_file(path):
            rewrite(path, change)


DAMAGE = {
    "missing shard": (lambda f: (f / SHARD).unlink(), [SHARD, "is missing"]),
    "truncated shard": (cut, [SHARD, "not a whole safetensors file", "bytes"]),
    "empty shard": (lambda f: (f / SHARD).write_bytes(b""), [SHARD, "not a whole safetensors file"]),
    "huge header": (
        lambda f: (f / SHARD).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        [SHARD, "not a whole safetensors file"],
    ),
    "index lies": (
        lambda f: rewrite(f / SHARD, lambda t: t.pop(sorted(t)[0])),
        [SHARD, "lacks the tensor", "model.safetensors.index.json"],
    ),
    "index forgets": (
        lambda f: edit_index(f, lambda m: m.pop(next(k for k in m if m[k] == SHARD))),
        [SHARD, "does not name"],
    ),
    "index leaves the folder": (
        lambda f: edit_index(f, lambda m: m.update({NORM: "../secret.safetensors"})),
        ["'../secret.safetensors'", NORM, "not the name of a file beside it"],
    ),
    "index is absolute": (
        lambda f: edit_index(f, lambda m: m.update({NORM: "/etc/passwd"})),
        ["'/etc/passwd'", "not the name of a file beside it"],
    ),
    "index wants a pickle": (
        lambda f: edit_index(f, lambda m: m.update({NORM: "x.bin"})),
        ["'x.bin'", "not a safetensors file"],
    ),
    "index without map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "missing tensors": (
        lambda f: edit_config(f, num_hidden_layers=3),
        ["lack", "tensors", "model.layers.2.", "config.json"],
    ),
    "surplus tensors": (
        lambda f: edit_config(f, num_hidden_layers=1),
        ["holds", "model.layers.1.", "config.json"],
    ),
    "wrong shape": (
        lambda f: edit_config(f, intermediate_size=1000),
        ["'model.layers.0.mlp.gate_proj.weight' has the shape [64, 32]", "[1000, 32]"],
    ),
    "untied head missing": (
        lambda f: rewrite_all(f, lambda t: t.pop(HEAD, None), lambda m: m.pop(HEAD)),
        ["lack 1 tensor ", HEAD],
    ),
    "two tied matrices": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        [HEAD, TABLE, "differ", "tie_word_embeddings"],
    ),
    "dtype": (foreign_dtype, [NORM, "I8", "F32, BF16, F16"]),
    "pickles": (pickles, ["pytorch_model.bin", "save_pretrained"]),
    "no weights": (
        lambda f: [path.unlink() for path in f.glob("model*")],
        ["neither model.safetensors nor model.safetensors.index.json"],
    ),
    "config": (lambda f: edit_config(f, sliding_window=7), ["config.json", "sliding_window = 7"]),
}


def rewrite_all(folder, change, index_change):
    for path in folder.glob("*.safetensors"):
        rewrite(path, change)
    edit_index(folder, index_change)


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory):
    config = draw_config("llama", 0, hidden_size=32, intermediate_size=64, tie_word_embeddings=False, vocab_size=61)
    return make_folder(tmp_path_factory.mktemp("sharded") / "model", config, shards=3)


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_message(case, sharded_folder, tmp_path, monkeypatch):
    damage, words = DAMAGE[case]
    folder = tmp_path / "model"
    shutil.copytree(sharded_folder, folder)
    damage(folder)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *_, **__: pytest.fail("something was allocated"))
    with pytest.raises(UserError) as error:
        load_hf(folder)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


# Export


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    lm = small_lm(draw_config("llama", 1))
    return lm, draw_params(lm)


def test_a_new_model_is_split_at_the_usual_size(small, tmp_path, monkeypatch):
    lm, params = small
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    save_hf(lm, params, tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "model" / file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes) == 4 * lm.parameter_count()
    assert max(sizes) <= 30_000
    _, loaded = load_hf(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_what_describes_a_model_comes_along(small, tmp_path):
    lm, params = small
    described = tmp_path / "described"
    described.mkdir()
    for name in ("tokenizer.json", "tokenizer.model"):
        (described / name).write_bytes(side_files()[name])
    (described / "training.log").write_text("{}")
    ids = {"bos_token_id": 3, "eos_token_id": [4, 5]}
    (described / "generation_config.json").write_text(json.dumps(ids))
    raw = write_config(lm.family, lm.config, special_ids=ids)
    (described / "config.json").write_text(json.dumps({**raw, "transformers_version": "4.40.0"}))
    save(lm, params, tmp_path / "model", model_folder=described)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model")
    }
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == ids
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written == {**raw, "transformers_version": "4.40.0"}
    loaded_lm, loaded = load_hf(tmp_path / "model")
    save(loaded_lm, loaded, tmp_path / "again", model_folder=described)
    assert contents(tmp_path / "again") == contents(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model: was there"):
        save_hf(loaded_lm, loaded, tmp_path / "later")
    (described / "tokenizer.json").unlink()
    (described / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="none of a tokenizer's files"):
        save(lm, params, tmp_path / "other", model_folder=described)


def test_an_export_replaces_an_export_and_nothing_else(small, tmp_path):
    lm, params = small
    folder = tmp_path / "model"
    folder.mkdir()
    save_hf(lm, params, folder)
    before = contents(folder)
    save_hf(lm, jax.tree.map(lambda leaf: leaf + 1, params), folder)
    assert contents(folder) != before
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        save_hf(lm, params, folder)
    assert (folder / "thesis.tex").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not part of a Hugging Face export"):
        save_hf(lm, params, tmp_path / "file")
    (folder / "thesis.tex").unlink()
    loaded_lm, loaded = load_hf(folder)
    with pytest.raises(UserError, match="came from"):
        save_hf(loaded_lm, loaded, folder)


def test_files_are_as_open_as_the_folder(small, tmp_path):
    lm, params = small
    save_hf(lm, params, tmp_path / "model")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "model").stat().st_mode & 0o666}


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_full_disk_leaves_the_last_export(small, tmp_path, monkeypatch, when):
    lm, params = small
    folder = tmp_path / "model"
    save_hf(lm, params, folder)
    before = contents(folder)
    if when == "before":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    else:

        def full(tensors, path, metadata):
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(UserError, match=r"GB could not be written \(No space left on device\)"):
        save_hf(lm, params, folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_export_leaves_the_last_one_and_the_next_cleans_up(small, tmp_path, monkeypatch):
    lm, params = small
    folder = tmp_path / "model"
    save_hf(lm, params, folder)
    before = contents(folder)
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    monkeypatch.setattr(export, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_hf(lm, changed, folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert (tmp_path / ".model.partial").is_dir()
    save_hf(lm, changed, folder)
    assert contents(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


UNFITTING = {
    "more rows": ("embed/table", lambda x: jnp.pad(x, ((0, 8), (0, 0))), r"embed/table has the shape \["),
    "fewer layers": ("layers/attn/q/kernel", lambda x: x[:1], r"layers/attn/q/kernel has the shape \[1, "),
    "turned": ("layers/mlp/up/kernel", lambda x: jnp.swapaxes(x, 1, 2), "layers/mlp/up/kernel has the shape"),
    "one number": ("norm/scale", lambda x: jnp.ones(()), r"norm/scale has the shape \[\], and the model's is \["),
    "whole numbers": ("norm/scale", lambda x: x.astype(int), "norm/scale is int32, and the model's is float32"),
    "complex numbers": ("norm/scale", lambda x: x.astype(complex), "norm/scale is complex64"),
    "missing": ("norm/scale", lambda x: None, "norm/scale is missing"),
    "unknown": ("norm/bias", lambda x: jnp.ones(4), "the model has no norm/bias"),
}


@pytest.mark.parametrize("what", UNFITTING)
def test_parameters_of_another_model_are_neither_written_nor_computed_with(what, small, tmp_path):
    lm, params = small
    path, change, message = UNFITTING[what]
    other = tree.insert(params, {path: change(tree.flatten(params).get(path))})
    with pytest.raises(UserError, match=message):
        save_hf(lm, other, tmp_path / "model")
    assert [*tmp_path.iterdir()] == []
    tokens = np.zeros((1, 3), np.int32)
    for run in (lm.logits, jax.jit(lm.logits), lambda *_: Decoder(lm)(other, [[1, 2]], max_new_tokens=2)):
        with pytest.raises(UserError, match=message):
            run(other, tokens)


def test_float64_is_not_written_over_float32(small, tmp_path):
    lm, params = small
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    with pytest.raises(UserError, match=r"embed/table is float64, and the model's is float32, and .* more differ"):
        save_hf(lm, wide, tmp_path / "model")
