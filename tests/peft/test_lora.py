"""LoRA and its kin against HF peft, merged and unmerged, in files and in whole runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.convert.__main__ import main as convert
from jaxllm.core import tree
from jaxllm.core.config import load
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params
from jaxllm.generate.__main__ import main as generate
from jaxllm.models import LM
from jaxllm.peft.adapter import read_adapter, with_adapter
from jaxllm.peft.lora import Lora
from jaxllm.peft.merge import merge
from jaxllm.runs.config import Config
from jaxllm.train.model import open_chosen_model
from tests.support.adapters import TOKENS, TOLERANCE, dear, logits, model, torch_logits
from tests.support.families import transformers_model
from tests.support.whole_runs import train, workplace

ROOT = Path(__file__).parents[2]
ROWS = tuple(map(int, dict.fromkeys(TOKENS[0, :5][::-1])))  # in no order

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": dict(r=4, lora_alpha=16.0),
    "dora with rsLoRA": dict(r=4, use_dora=True, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "some layers": dict(r=2, target_modules=("k_proj", "o_proj"), layers_to_transform=(1,), use_dora=True),
    "pissa": dict(
        r=3,
        lora_alpha=4.0,
        target_modules=("q_proj", "down_proj"),
        init_lora_weights="pissa",
        rank_pattern={"down_proj": 2},
        use_rslora=True,
    ),
    "patterns": dict(r=2, rank_pattern={"0.*.q_proj": 5, "up_proj": 3}, alpha_pattern={"layers.1.mlp.*": 3.0}),
    "a regular expression": dict(r=3, target_modules=r".*layers\.0\..*(gate|v)_proj"),
    "modules to save": dict(r=2, modules_to_save=("lm_head", "embed_tokens"), bias="all"),
    "tied": dict(r=2, modules_to_save=("lm_head",)),
    "token rows": dict(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",), trainable_token_indices=ROWS),
    "tied token rows": dict(r=2, target_modules=("q_proj",), use_dora=True, trainable_token_indices=ROWS),
    "norms": dict(r=2, target_modules=("q_proj",), modules_to_save=("norm",)),
    "embedding and head": dict(r=2, target_modules=("q_proj", "embed_tokens", "lm_head"), use_dora=True, bias="all"),
    "head with pissa": dict(r=2, target_modules=("q_proj", "lm_head"), init_lora_weights="pissa"),
    "tied head": dict(r=2, target_modules=".*q_proj|lm_head", save_embedding_layers=True),
    "biases of the adapted": dict(r=2, target_modules=("q_proj",), bias="lora_only"),
}


def trained(lm: LM, base: Params, method: Lora) -> Params:
    """`base` with an adapter as after training: all that trains has moved, but for the padding of ranks and layers."""
    adapted, rng = method.add(lm), np.random.default_rng(1)
    params = jax.jit(adapted.with_extra)(base, jax.random.key(0))
    leaves, chosen = tree.flatten(params), tree.flatten(method.mask(adapted))

    def moved(path: str, leaf: jax.Array) -> jax.Array:
        folder, _, name = path.rpartition("/")
        new = leaf + 0.15 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        if name in ("lora_a", "lora_b", "lora_magnitude") and path.startswith("layers/"):
            has_rank = leaves[f"{folder}/lora_a"][:, 0] != 0
            own = {
                "lora_a": has_rank[:, None],
                "lora_b": has_rank[..., None],
                "lora_magnitude": has_rank.any(-1)[:, None],
            }
            return jnp.where(own[name], new, leaf)
        return new

    return tree.insert(params, {path: moved(path, leaf) for path, leaf in leaves.items() if chosen[path]})


@pytest.mark.parametrize(
    "variant",
    dear(VARIANTS, "some layers", "patterns", "modules to save", "norms", "tied", "tied token rows", "tied head"),
)
def test_its_files_load_in_hf_peft_and_come_back(variant, tmp_path):
    """And at the start it changes nothing; and what it has become can be merged."""
    lm, base = model(tie_word_embeddings=variant.startswith("tied"))
    method = Lora(type="lora", **VARIANTS[variant])
    params, without = trained(lm, base, method), logits(lm, base)
    ours, start = logits(lm, params), logits(lm, jax.jit(method.add(lm).with_extra)(base, jax.random.key(0)))
    np.testing.assert_allclose(start, without, atol=2e-5)
    assert np.abs(ours - without).max() > 0.1
    method.export(method.add(lm), params, tmp_path / "adapter", model_folder=tmp_path, base="base")
    theirs = peft.PeftModel.from_pretrained(
        transformers_model(lm.config, base, tmp_path / "base"), tmp_path / "adapter"
    )
    np.testing.assert_allclose(ours, torch_logits(theirs), atol=TOLERANCE)
    if "pissa" in variant:  # comes back as the plain adapter of twice the rank that it is in the files
        again = read_adapter(tmp_path / "adapter").method
        assert (again.r, again.init_lora_weights) == (2 * method.r, True)
        back = with_adapter(tmp_path / "adapter", lm, lambda: base, again)()
        np.testing.assert_allclose(logits(again.add(lm), back), ours, atol=TOLERANCE)
    else:
        back = with_adapter(tmp_path / "adapter", lm, lambda: base, method)()
        for path, leaf in tree.flatten(params).items():
            np.testing.assert_array_equal(tree.at(back, path), leaf, err_msg=path)
    merged = merge(params)
    np.testing.assert_allclose(logits(lm, merged), ours, atol=TOLERANCE)
    if method.trainable_token_indices:  # the other rows keep their bits
        kept = (merged["embed"]["table"] == base["embed"]["table"]).all(axis=1)
        assert {*np.flatnonzero(~kept)} == {*ROWS}


# As HF peft names them; with what it draws at the start, where B is not zero.
SAVED: dict[str, dict[str, Any]] = {
    "lora": dict(r=4, lora_alpha=16, target_modules="all-linear"),
    "dora": dict(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, use_rslora=True, bias="all"),
    "patterns": dict(
        r=2,
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=[1],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"layers.1.mlp.up_proj": 5},
        modules_to_save=["lm_head"],
    ),
    "tied": dict(r=2, target_modules=".*q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "norms": dict(r=2, target_modules=["q_proj"], layers_to_transform=[], modules_to_save=["norm"]),
    "whole modules and names": dict(
        r=2,
        target_modules=["model.layers.1.self_attn.q_proj", "v_proj", "up_proj"],
        layers_to_transform=[0],
        modules_to_save=["mlp"],
    ),
    "token rows": dict(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [*ROWS]}),
    "tied token rows": dict(r=2, target_modules=["q_proj"], trainable_token_indices=[*ROWS]),
    "embedding and head": dict(
        r=2,
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        layers_to_transform=[0],
        rank_pattern={"lm_head": 3},
        use_rslora=True,
    ),
    "tied head": dict(r=2, lora_alpha=0.2, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    "saved embeddings": dict(r=2, target_modules=["q_proj"], save=True),
    "tied and saved with rows": dict(r=2, target_modules=["v_proj"], trainable_token_indices=[*ROWS], save=True),
    "saved beside whole": dict(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], save=True),
}


@pytest.mark.parametrize(
    "variant", dear(SAVED, "dora", "norms", "tied", "token rows", "whole modules and names", "embedding and head")
)
def test_files_of_hf_peft_load_and_merge(variant, tmp_path, shared):
    lm, base = model(tie_word_embeddings=variant.startswith("tied"), num_attention_heads=8, num_key_value_heads=2)
    module = transformers_model(lm.config, base, tmp_path / "base")
    torch.manual_seed(0)
    settings = dict(SAVED[variant])
    saves = settings.pop("save", "auto")  # True: embeddings that are others than the base's, and do not train
    settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(module, settings)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.requires_grad and "lora_A" not in name and "lora_B" not in name:
                weight *= 1 + 0.3 * torch.rand(weight.shape)
            elif saves is True and ("embed_tokens" in name or "lm_head" in name):
                weight *= 1.1
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=saves)
    wanted = torch_logits(theirs.eval())
    assert np.abs(wanted - logits(lm, base)).max() > 0.05
    adapter = read_adapter(tmp_path / "adapter")
    beside = with_adapter(tmp_path / "adapter", lm, lambda: base, adapter.method)()
    np.testing.assert_allclose(logits(lm, beside), wanted, atol=TOLERANCE)
    if saves is True:  # and what was not trained is in the files of what is trained on
        assert adapter.method.save_embedding_layers
        adapter.method.export(adapter.method.add(lm), beside, tmp_path / "on", model_folder=tmp_path, base="base")
        on = peft.PeftModel.from_pretrained(transformers_model(lm.config, base, tmp_path / "again"), tmp_path / "on")
        np.testing.assert_allclose(torch_logits(on.eval()), wanted, atol=TOLERANCE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "models/stories260K" / name, tmp_path / "base" / name)
    paths = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    assert convert(["merge", *paths]) == 0
    again, params = jaxllm.load_hf(tmp_path / "merged")
    np.testing.assert_allclose(logits(again, params), wanted, atol=TOLERANCE)


def test_named_adapters_of_hf_peft(tmp_path, shared):
    """Each in a folder of its own: one at a time, all of them merged, and the last of them to be trained on."""
    lm, base = model(num_attention_heads=8, num_key_value_heads=2)
    torch.manual_seed(0)
    first = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2, target_modules=["q_proj", "down_proj"])
    second = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=3, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(transformers_model(lm.config, base, tmp_path / "base"), first, "first")
    theirs.add_adapter("second", second)
    theirs.save_pretrained(tmp_path / "adapters")
    folders = [tmp_path / "adapters" / name for name in ("first", "second")]
    for folder in folders:
        theirs.set_adapter(folder.name)
        alone = with_adapter(folder, lm, lambda: base)()
        np.testing.assert_allclose(logits(lm, alone), torch_logits(theirs.eval()), atol=TOLERANCE)
    wanted = torch_logits(theirs.merge_and_unload(adapter_names=["first", "second"]))
    assert np.abs(wanted - logits(lm, alone)).max() > 0.05

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "models/stories260K" / name, tmp_path / "base" / name)
    assert convert(["merge", str(tmp_path / "base"), *map(str, folders), str(tmp_path / "merged")]) == 0
    again, params = jaxllm.load_hf(tmp_path / "merged")
    np.testing.assert_allclose(logits(again, params), wanted, atol=TOLERANCE)

    adapters = f"model={{path: {tmp_path / 'base'}, adapter: {[*map(str, folders)]}}}"
    section = "peft={type: lora, r: 3, target_modules: [q_proj, v_proj]}"
    opened = open_chosen_model(load(ROOT / "configs/finetune.yaml", [adapters, section], Config), Layout.single())
    params = opened.load()
    assert params["layers"]["attn"]["v"]["lora_a"].shape[-1] == 3
    np.testing.assert_allclose(logits(lm, params), wanted, atol=TOLERANCE)
    with pytest.raises(UserError, match=r"adapters: has no adapter_config.json; it has those of .*first, .*second"):
        read_adapter(tmp_path / "adapters")


def test_pissa_starts_as_in_hf_peft(tmp_path):
    """The matrices are those of peft's, but for the signs of singular vectors."""
    lm, base = model()
    settings = dict(r=3, lora_alpha=12, target_modules=("q_proj",), init_lora_weights="pissa")
    leaves = tree.flatten(Lora(type="lora", **settings).add(lm).with_extra(base, jax.random.key(0)))
    theirs = peft.get_peft_model(
        transformers_model(lm.config, base, tmp_path), peft.LoraConfig(**{**settings, "target_modules": ["q_proj"]})
    )
    a = theirs.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight.detach().numpy().T
    np.testing.assert_allclose(np.abs(leaves["layers/attn/q/lora_a"][1]), np.abs(a), atol=1e-5)


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[LM, Params, Path]:
    """A model, and the folder of an adapter of its."""
    lm, base = model()
    method = Lora(type="lora", r=2, target_modules=("q_proj",))
    method.export(method.add(lm), trained(lm, base, method), tmp_path / "adapter", model_folder=tmp_path, base=None)
    return lm, base, tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(alora_invocation_tokens=[1]), "alora_invocation_tokens is .1., which is not implemented"),
        (dict(some_new_key=3), "some_new_key is 3, which is not implemented"),
        (dict(init_lora_weights="pissa"), "also changes the base model"),
        (dict(peft_type="VERA"), "peft_type is .VERA., which is not implemented; .*LORA"),
        (dict(r=0), "r is 0: a rank of 0 adds nothing; set it to 1 or more"),
        (dict(r=4), r"lora_A.weight has the shape \[2, .*\], and for this model it is \[4,"),
        (dict(target_modules=["q_proj", "k_proj"]), "lacks .*k_proj.lora_A.weight"),
        (dict(target_modules=["k_proj"], layers_to_transform=[0]), "lacks .*k_proj.lora_A.weight"),
        (dict(layers_to_transform=[0]), "holds 2 tensors that .* does not ask for"),
        (dict(target_modules=["c_attn"]), "adapter_config.json, for this model: .*matches no matrix"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_one_message(adapter, changes, message):
    lm, base, folder = adapter
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        with_adapter(folder, lm, lambda: base)


def test_an_adapter_of_a_resized_vocabulary(adapter):
    lm, base, folder = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    rows = lm.config.vocab_size + 2
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**weights, name: np.zeros((rows, lm.config.hidden_size))}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"embed_tokens.weight has {rows} rows, .*resize_token_embeddings\({rows}\)"):
        with_adapter(folder, lm, lambda: base)


def test_an_adapter_of_a_tied_head_alone(adapter):
    """HF peft then has two matrices where the model has one."""
    _, _, folder = adapter
    lm, base = model(tie_word_embeddings=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(target_modules=["q_proj", "lm_head"])))
    with pytest.raises(UserError, match=r"adapter_config.json: .* without ensure_weight_tying.*keeps the old one"):
        with_adapter(folder, lm, lambda: base)


def test_an_adapter_of_a_wider_model(adapter):
    lm, _, folder = adapter
    other, base = model(hidden_size=80)
    assert other.config.hidden_size != lm.config.hidden_size
    with pytest.raises(UserError, match="take the base model that the adapter was made for"):
        with_adapter(folder, other, lambda: base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target_modules=("c_attn",)), "matches no matrix of the model; choose among q_proj, k_proj"),
        (dict(target_modules=("q_proj", "k_prj")), "names 'k_prj', .* Did you mean 'k_proj'"),
        (
            dict(target_modules="q_proj"),
            r"matches no matrix of the model \(a text must match whole names: give a list\)",
        ),
        (dict(layers_to_transform=(2,)), "names layer 2, and the model has 0 to 1"),
        (
            dict(modules_to_save=("layers.1.mlp.up_proj",)),
            "up_proj in some of its layers only.* without a layer: up_proj",
        ),
        (dict(modules_to_save=("model.layers.0.mlp.up_proj",)), "up_proj in some of its layers only"),
        (dict(modules_to_save=("score",)), "names 'score', which the model does not have"),
        (dict(modules_to_save=("layers",)), "means model.layers, a list of layers, which HF peft does not save"),
        (dict(modules_to_save=("layers.1.mlp",)), "means up_proj in some of its layers only|gate_proj in some"),
        (dict(target_modules=("up_proj",), modules_to_save=("mlp",)), "that modules_to_save trains as a whole, and no"),
        (dict(rank_pattern={"c_attn": 2}), "rank_pattern has 'c_attn', which matches none"),
        (dict(rank_pattern={"*.q_proj": 2}), "rank_pattern has '[*].q_proj', which is no regular expression"),
        (dict(alpha_pattern={"(q_proj": 2.0}), "alpha_pattern has '[(]q_proj', which is no regular expression"),
        (dict(bias="all"), "has no such bias"),
        (dict(bias="lora_only", layers_to_transform=(0,)), "has an adapter in some layers only"),
        (dict(r=0), "a rank of 0 adds nothing; set it to 1 or more"),
        (dict(rank_pattern={"q_proj": 0}), "a rank of 0 adds nothing"),
        (dict(r=50, init_lora_weights="pissa"), "the rank 50 of q_proj is above .*, that of the matrix"),
        (dict(target_modules="(q_proj"), "no regular expression"),
        (
            dict(target_modules=("lm_head",), lora_dropout=0.1),
            "lora_dropout is 0.1, which is not implemented for the head",
        ),
        (
            dict(target_modules=("embed_tokens",), init_lora_weights="pissa"),
            "start HF peft has for linear layers alone",
        ),
        (
            dict(target_modules=("embed_tokens",), trainable_token_indices=(3,)),
            "and trainable_token_indices rows of it",
        ),
        (dict(trainable_token_indices=(3, 999)), "trainable_token_indices has 999, and the embedding has .* rows"),
        (dict(trainable_token_indices=(3, 3)), "each id once"),
        (dict(trainable_token_indices={"lm_head": [3]}), "only tokens of embed_tokens can train; got some of lm_head"),
        (
            dict(trainable_token_indices=(3,), modules_to_save=("embed_tokens",)),
            "trains the whole embedding, and trainable_token_indices rows of it; remove one",
        ),
    ],
)
def test_what_cannot_be_added_is_refused(settings, message):
    lm, _ = model(attention_bias=False, mlp_bias=False)

    def mask() -> Any:
        method = Lora(type="lora", **settings)
        return method.mask(method.add(lm))

    with pytest.raises((UserError, ValueError), match=message):
        mask()


@pytest.fixture(scope="module")
def place(tmp_path_factory, shared):
    folder = tmp_path_factory.mktemp("lora")
    with workplace(folder, shared) as config:
        yield folder, config, [f"model={{path: {shared / 'models/stories260K'}}}", "optim.weight_decay=0.01"]


LORA = ["peft.type=lora", "peft.r=4", "peft.lora_alpha=8"]


def test_what_a_run_leaves_is_merged_trained_on_and_generated_from(place, capsys):
    folder, config, base = place
    whole = folder / "whole"
    assert train(config, f"output_dir={whole}", *base, *LORA, "train.steps=8").status == 0
    assert not (whole / "export" / "hf").exists()
    # The model of a run is the merged one, so what is made of it is what the adapter makes of its base.
    assert convert(["to-hf", str(whole), str(folder / "of_run")]) == 0
    model_folder = json.loads((whole / "export/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert convert(["merge", model_folder, str(whole), str(folder / "merged")]) == 0
    merged = jaxllm.load_hf(folder / "merged")[1]
    for path, leaf in tree.flatten(jaxllm.load_hf(folder / "of_run")[1]).items():
        np.testing.assert_array_equal(leaf, tree.at(merged, path), err_msg=path)
    capsys.readouterr()
    for adapter in (whole, whole / "export" / "adapter"):  # a second time would change the model
        assert convert(["merge", str(whole), str(adapter), str(folder / "twice")]) == 2
        assert f"{adapter}: is merged into the model of {whole} already" in capsys.readouterr().err
    said = []
    for name in ("whole", "merged"):
        assert generate([str(folder / name), "--prompt", "Once", "--max-new-tokens", "8"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    on = train(config, f"output_dir={folder / 'on'}", *base, *LORA, "train.steps=3", f"model.adapter={whole}")
    full = train(config, f"output_dir={folder / 'full'}", *base, "train.steps=3", f"model.adapter={whole}")
    assert on.status == full.status == 0
    end, *starts = (held_out(folder / name) for name in ("whole", "on", "full"))
    np.testing.assert_allclose([start[0] for start in starts], end[-1], rtol=1e-5)
    with pytest.raises(UserError, match="is merged into the model of"):
        train(config, f"output_dir={folder / 'x'}", f"model={{path: {whole}}}", f"model.adapter={whole}")
    with pytest.raises(UserError, match=r"another adapter than the peft section describes; it is .*r: 4"):
        train(config, f"output_dir={folder / 'x'}", *base, "peft.type=lora", "peft.r=5", f"model.adapter={whole}")


def held_out(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval/held_out/loss"] for line in lines if "eval/held_out/loss" in line]
