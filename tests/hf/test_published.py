"""Every published config.json of an architecture that we have, made small, has the logits of transformers.

A model is small by its sizes alone. All other fields, and the forms of the rotary embedding, come from the file.
"""

import copy
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxllm.core.errors import UserError
from jaxllm.hf import load_hf, save_hf
from jaxllm.hf.config import _log_once, parse_config
from jaxllm.models import FAMILIES
from jaxllm.nn.rope import DefaultRope

# Logits of standard deviation 1 to 3 in float32 (DESIGN, section 5).
TOLERANCE = 1e-4
HEAD_DIM, ORIGINAL = 16, 32
WITHIN, BEYOND = 24, 48
WINDOW = 20

# Fields that other publications of the same models have.
VARIANTS = {
    "phi-3_5.json": [
        # As the first Phi-3 with 128k tokens.
        {"rope_scaling.type": "su", "rope_scaling.original_max_position_embeddings": 4096},
        {"my_note": "trained on a farm", "license": "mit", "tags": ["a", "b"], "_mine": 3, "run": {"steps": 7}},
    ],
    "mistral_7b_v03.json": [
        {"head_dim": 160, "id2label": {"0": "LABEL_0"}, "pruned_heads": {}, "max_length": 20, "return_dict": True},
        {"sliding_window": 4096},
    ],
    "llama2_7b.json": [
        {
            "auto_map": {"AutoModelForCausalLM": "someone/repo--modeling_llama_yarn.LlamaForCausalLM"},
            "rope_scaling": {
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 4096,
                "finetuned": True,
            },
        },
        {"auto_map": {}, "quantization_config": {}, "rope_scaling": {}, "architectures": ["LLaMAForCausalLM"]},
    ],
}


def published(folder):
    """`(name, config)` of every file whose architecture is here, unless its weights are quantised, and its variants."""
    architectures = {FAMILIES[name].architectures[0] for name in FAMILIES}
    for path in sorted(folder.glob("*.json")):
        raw = json.loads(path.read_text())["config"]
        if raw["architectures"][0] in architectures and "quantization_config" not in raw:
            yield path.name, raw
            for i, variant in enumerate(VARIANTS.get(path.name, [])):
                changed = copy.deepcopy(raw)
                for key, value in variant.items():
                    *outer, inner = key.split(".")
                    (changed[outer[0]] if outer else changed)[inner] = value
                yield f"{path.name} {i}", changed


def small(raw):
    """`raw` with small sizes, grouped heads where it has those, and lengths that the tests' rows go beyond."""
    raw = copy.deepcopy(raw)
    heads = raw["num_attention_heads"]
    own_width = "head_dim" in raw and raw["head_dim"] * heads != raw["hidden_size"]
    raw |= {"num_attention_heads": 4, "hidden_size": 32 if own_width else 4 * HEAD_DIM}
    if raw.get("num_key_value_heads"):
        raw["num_key_value_heads"] = 4 if raw["num_key_value_heads"] == heads else 2
    if "head_dim" in raw:
        raw["head_dim"] = HEAD_DIM
    raw |= {"intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(raw.get(name), int):
            raw[name] %= 61
    if raw.get("sliding_window"):
        raw |= {name: WINDOW for name in ("sliding_window", "sliding_window_size") if name in raw}
    table = raw.get("rope_scaling") or {}
    places = [place for place in (raw, table) if place.get("original_max_position_embeddings")]
    if places and table:
        scale = places[0]["original_max_position_embeddings"] / ORIGINAL
        for place in (raw, table):
            for name in ("max_position_embeddings", "original_max_position_embeddings"):
                if place.get(name):
                    place[name] = int(place[name] / scale)
    pairs = int(HEAD_DIM * raw.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if name in table:
            table[name] = table[name][:: len(table[name]) // pairs][:pairs]
    return raw


def torch_model(raw):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    config = AutoConfig.for_model(**copy.deepcopy({**raw, "torch_dtype": "float32"}))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def randomise(model):
    """Weights under which every part matters and logits have a standard deviation above 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.2, generator=generator)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)


@pytest.fixture(scope="module")
def logits():
    """Logits by our code; one program for all models that differ by their rotation alone."""
    programs = {}

    def run(lm, params, tokens):
        plain = lm.config.model_copy(update={"rope": DefaultRope(), "rope_theta": 1e4, "max_position_embeddings": 64})
        ctx = lm.context(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        if plain not in programs:
            programs[plain] = jax.jit(lambda params, tokens, ctx: lm.head(params, lm.hidden(params, tokens, ctx)[0]))
        return np.asarray(programs[plain](params, tokens, ctx))

    return run


def test_all_of_ours_load_and_are_transformers(shared, tmp_path, logits):
    """And go out again as they came: their config.json unchanged, of the same name."""
    ours, compared = {}, {}
    for name, raw in published(shared / "published" / "configs"):
        parse_config(raw, name)
        raw = small(raw)
        config = parse_config(raw, name)[1]
        model = torch_model(raw)
        if config not in ours:
            randomise(model)
            folder = tmp_path / str(len(ours))
            model.save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps(raw))
            lm, params = load_hf(folder)
            assert lm.config == config
            save_hf(lm, params, tmp_path / f"{len(ours)} export")
            assert json.loads((tmp_path / f"{len(ours)} export" / "config.json").read_text()) == raw
            tokens = np.random.default_rng(0).integers(0, 61, (1, BEYOND), dtype=np.int32)
            rows = [tokens[:, :length] for length in (WITHIN, BEYOND)]
            ours[config] = model.state_dict(), rows, [logits(lm, params, row) for row in rows]
        weights, rows, found = ours[config]
        model.load_state_dict(weights)
        for row, mine in zip(rows, found, strict=True):
            with torch.no_grad():
                theirs = model(torch.tensor(row).long()).logits.numpy()
            assert theirs.std() >= 1, name
            compared[name, row.shape[1]] = float(np.abs(mine - theirs).max())
    assert len(compared) >= 2 * 34
    assert {key: miss for key, miss in compared.items() if miss > TOLERANCE} == {}


def test_quantised_weights_are_refused(shared):
    raw = json.loads((shared / "published" / "configs" / "Qwen--Qwen3-32B-FP8.json").read_text())["config"]
    with pytest.raises(UserError, match=r"quantization_config = .* use the checkpoint before quantisation"):
        parse_config(raw)


def test_of_any_other_the_first_thing_said_is_that_it_is_not_implemented(shared):
    """Whatever code or quantised weights it comes with; and which is nearest in structure."""
    architectures = {FAMILIES[name].architectures[0] for name in FAMILIES}
    said = {}
    for path in sorted((shared / "published" / "configs").glob("*.json")):
        raw = json.loads(path.read_text())["config"]
        if raw["architectures"][0] not in architectures:
            with pytest.raises(UserError) as error:
                parse_config(raw)
            said[path.stem] = str(error.value)
    assert len(said) >= 60
    assert all("is not implemented" in message.partition(".")[2][:100] for message in said.values())
    assert not any("code that came with" in message or "before quantisation" in message for message in said.values())
    nearest = {name: message.partition(" by its fields is ")[2] for name, message in said.items()}
    assert nearest["mistralai--Mixtral-8x7B-v0.1"].startswith("LlamaForCausalLM, which lacks num_experts_per_tok = 2")
    assert nearest["starcoder2"].startswith("MistralForCausalLM, which lacks attention_dropout = 0.1")
    assert nearest["minicpm_2b"].startswith("LlamaForCausalLM, which lacks scale_emb = 12, dim_model_base = 256")
    assert "None of them is near: its config has no hidden_size" in said["gpt2"]


def test_what_is_left_out_is_said_once(caplog):
    _log_once.cache_clear()
    raw = {"model_type": "phi3", "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "my_note": "kept"}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            parse_config(raw)
    assert [record.getMessage() for record in caplog.records] == [
        'config.json: nothing reads "my_note"; an export keeps what is there',
        "config.json: auto_map is not followed: Phi3ForCausalLM is computed by jaxllm's own code",
    ]
