"""AdaLoRA against HF peft: what its triplets are worth, how many are kept and which, the loss, and the files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import jaxllm
from jaxllm.convert.__main__ import main as convert
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.peft.adalora import AdaLora
from jaxllm.peft.adapter import read_adapter, with_adapter
from jaxllm.peft.merge import merge
from jaxllm.runs.open import open_model
from tests.support.adapters import TOKENS, TOLERANCE, logits, model, torch_logits
from tests.support.families import transformers_model
from tests.support.whole_runs import Ran, read_metrics, train, workplace

NAMES = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_E": "lora_e"}
STEPS, RATE = 12, 0.1
SCHEDULE = dict(init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, beta1=0.8, beta2=0.7, orth_reg_weight=0.3)


def beside(lm, method):
    """The module of each target and layer in transformers, and where its leaves are."""
    for module, layers in method.targets.matrices(lm):
        for i, name in enumerate(module.names):
            if layers[i]:
                yield name, module.folder, i


def test_triplets_are_kept_as_by_hf_peft(tmp_path):
    """The same gradients drawn at random for both, and plain descent between."""
    lm, base = model()
    targets = ("q_proj", "down_proj")
    method = AdaLora(type="adalora", target_modules=targets, **SCHEDULE)
    settings = peft.AdaLoraConfig(total_step=STEPS, target_modules=[*targets], **SCHEDULE)
    theirs = peft.get_peft_model(transformers_model(lm.config, base, tmp_path), settings)
    allocator, rng = theirs.base_model.rankallocator, np.random.default_rng(0)
    adapted = method.add(lm)
    params = {
        path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in tree.flatten(jax.jit(adapted.with_extra)(base, jax.random.key(0))).items()
        if path.rpartition("/")[2] in NAMES.values()
    }
    parameters = dict(theirs.base_model.model.named_parameters())

    def of_file(name, end, array):
        return np.asarray(array).T if end != "lora_E" else np.asarray(array)[:, None]

    def put(name, end, array, where):
        value = torch.tensor(np.ascontiguousarray(of_file(name, end, array)))
        parameter = parameters[f"{name}.{end}.default"]
        if where == "grad":
            parameter.grad = value
        else:
            parameter.data.copy_(value)

    for name, folder, i in beside(lm, method):
        for end, leaf in NAMES.items():
            put(name, end, params[f"{folder}/{leaf}"][i], "data")
    tx = method.transform(optax.with_extra_args_support(optax.sgd(RATE)), lm, STEPS)
    nested = tree.insert({}, params)
    state, update, chosen = tx.init(nested), jax.jit(tx.update), set()
    budgets = method.budgets(lm, STEPS)
    for step in range(1, STEPS + 1):
        grads = {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in params.items()}
        updates, state = update(tree.insert({}, grads), state, nested)
        nested = optax.apply_updates(nested, updates)
        for name, folder, i in beside(lm, method):
            for end, leaf in NAMES.items():
                put(name, end, grads[f"{folder}/{leaf}"][i], "grad")
        with torch.no_grad():
            for name, _, _ in beside(lm, method):
                for end in NAMES:
                    parameter = parameters[f"{name}.{end}.default"]
                    parameter -= RATE * parameter.grad
        averages = dict(allocator.exp_avg_ipt), dict(allocator.exp_avg_unc)
        theirs.base_model.update_and_allocate(step)
        if step < STEPS - method.tfinal:
            averages = allocator.exp_avg_ipt, allocator.exp_avg_unc
            assert budgets[step] == allocator.budget_schedule(step)[0]
        for name, folder, i in beside(lm, method):
            for end, leaf in NAMES.items():
                path, key = f"{folder}/{leaf}", f"{name}.{end}.default"
                wanted = parameters[key].detach().numpy()
                np.testing.assert_allclose(of_file(name, end, tree.at(nested, path)[i]), wanted, rtol=1e-5, atol=1e-6)
                if step < STEPS - method.tfinal:
                    for ours, kind in zip((state.sensitivity, state.uncertainty), averages, strict=True):
                        np.testing.assert_allclose(
                            of_file(name, end, tree.at(ours, path)[i]), kind[key].numpy(), rtol=2e-5, atol=1e-6
                        )
            values = tree.at(nested, f"{folder}/lora_e")[i]
            np.testing.assert_array_equal(values == 0, parameters[f"{name}.lora_E.default"][:, 0].detach() == 0)
        chosen.add(sum(int((tree.at(nested, f"{folder}/lora_e")[i] != 0).sum()) for _, folder, i in beside(lm, method)))
    assert {16, 8} <= chosen
    assert len(chosen) > 2


def drawn(lm, base, method):
    """An adapter whose triplets are all there but for some, as after training."""
    adapted, rng = method.add(lm), np.random.default_rng(1)
    params = jax.jit(adapted.with_extra)(base, jax.random.key(0))
    leaves = tree.flatten(params)
    moved = {}
    for path in adapted.extra:
        if path.endswith(("lora_a", "lora_b")):
            moved[path] = leaves[path] + jnp.where(leaves[path] == 0, 0, 0.2 * rng.normal(size=leaves[path].shape))
        elif path.endswith("lora_e"):
            chosen = leaves[path.replace("lora_e", "lora_scale")][:, None] != 0
            kept = (rng.random(leaves[path].shape) < 0.6) & chosen & ("attn/v" not in path)  # there none is left
            moved[path] = jnp.where(kept, 2 * rng.normal(size=leaves[path].shape), 0)
    moved = {path: leaf.astype(jnp.float32) for path, leaf in moved.items()}
    return adapted, tree.insert(params, moved)


def test_its_files_load_in_hf_peft_and_come_back(tmp_path):
    lm, base = model(num_attention_heads=8, num_key_value_heads=2)
    method = AdaLora(type="adalora", init_r=5, target_r=2, lora_alpha=16, bias="all", layers_to_transform=(1,))
    adapted, params = drawn(lm, base, method)
    ours = logits(adapted, params)
    assert np.abs(ours - logits(lm, base)).max() > 0.1
    method.export(adapted, params, tmp_path / "adapter", model_folder=tmp_path, base="base")
    theirs = peft.PeftModel.from_pretrained(
        transformers_model(lm.config, base, tmp_path / "base"), tmp_path / "adapter"
    )
    np.testing.assert_allclose(ours, torch_logits(theirs.eval()), atol=TOLERANCE)
    np.testing.assert_allclose(
        logits(adapted, with_adapter(tmp_path / "adapter", lm, lambda: base, method)()), ours, atol=2e-5
    )
    np.testing.assert_allclose(logits(lm, merge(params)), ours, atol=TOLERANCE)
    assert read_adapter(tmp_path / "adapter").method.computes(lm) == method.computes(lm)


def test_files_of_hf_peft_load_and_the_whole_loss_is_theirs(tmp_path):
    """After theirs has taken triplets away; the penalty is that of all triplets, before."""
    lm, base = model()
    settings = dict(init_r=4, target_r=2, lora_alpha=12, orth_reg_weight=0.7)
    names = ["q_proj", "up_proj"]
    theirs = peft.get_peft_model(
        transformers_model(lm.config, base, tmp_path / "base"),
        peft.AdaLoraConfig(total_step=2, target_modules=names, task_type="CAUSAL_LM", **settings),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                weight += 0.5 * torch.randn(weight.shape)
    theirs.save_pretrained(tmp_path / "whole")
    tokens = torch.tensor(TOKENS)
    loss = theirs(tokens, labels=tokens).loss
    method = AdaLora(type="adalora", target_modules=tuple(names), **settings)
    params = with_adapter(tmp_path / "whole", lm, lambda: base, method)()
    z = logits(method.add(lm), params)[:, :-1]
    ours = optax.softmax_cross_entropy_with_integer_labels(z, TOKENS[:, 1:]).mean() + jax.jit(method.penalty(lm))(
        params
    )
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    loss.backward()
    for step in (1, 2):
        theirs.base_model.update_and_allocate(step)
    wanted = torch_logits(theirs.eval())
    theirs.save_pretrained(tmp_path / "pruned")
    pruned = with_adapter(tmp_path / "pruned", lm, lambda: base)()
    np.testing.assert_allclose(logits(lm, pruned), wanted, atol=TOLERANCE)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_penalty_has_a_gradient_where_a_layer_has_no_triplets(weight):
    lm, base = model()
    method = AdaLora(type="adalora", orth_reg_weight=weight, layers_to_transform=(1,))
    penalty = method.penalty(lm)
    if not weight:
        assert penalty is None
        return
    params = jax.jit(method.add(lm).with_extra)(base, jax.random.key(0))
    grads = tree.flatten(jax.jit(jax.grad(penalty))(params))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in grads.values())
    assert float(jnp.abs(grads["layers/attn/q/lora_a"][1]).max()) > 0
    assert float(jnp.abs(grads["layers/attn/q/lora_a"][0]).max()) == 0


def test_what_there_is_nothing_to_allocate_in_is_refused():
    lm, _ = model()
    with pytest.raises(UserError, match="leaves nothing to take away"):
        AdaLora(type="adalora", init_r=8).budgets(lm, 10)
    with pytest.raises(UserError, match="leave none of the run's 10 steps"):
        AdaLora(type="adalora", tinit=6, tfinal=4).budgets(lm, 10)


# Whole runs

ADALORA = ["peft={type: adalora, init_r: 4, target_r: 2, tinit: 1, tfinal: 3, deltaT: 3}", "optim.weight_decay=0.01"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, shared):
    folder = tmp_path_factory.mktemp("adalora")
    with workplace(folder, shared) as config:
        yield folder, config, [f"model={{path: {shared / 'models/tinystories-656k'}}}", "data.seq_len=64", *ADALORA]


@pytest.fixture(scope="module")
def whole(place) -> Ran:
    """A run of 12 steps that takes triplets away after the steps 3, 6 and 9."""
    folder, config, options = place
    return train(config, f"output_dir={folder / 'whole'}", *options, "checkpoint.keep=9")


def left(run) -> dict[str, list[bool]]:
    """Which triplets of each matrix are left in the end."""
    return json.loads((run / "export/adapter/adapter_config.json").read_text())["rank_pattern"]


def losses(run) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(run) if "train/loss" in line}


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.full)])
def test_a_run_killed_while_triplets_go_ends_as_one_that_was_not(place, whole, devices):
    """After the first of three choices; with the same bits on the same mesh, and the same choices on another."""
    folder, config, options = place
    pattern = left(whole.folder)
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    assert len({sum(kept) for kept in pattern.values()}) > 2
    killed = folder / f"killed-{devices}"
    shutil.copytree(whole.folder, killed, ignore=shutil.ignore_patterns("8", "12", "export"))
    (killed / "checkpoints/latest").write_text("4\n")
    mesh = ["mesh={data: 2, fsdp: 2, tensor: 2}", "train.micro_batch_size=2"] if devices == 8 else []
    ran = train(config, f"output_dir={killed}", *options, "checkpoint.keep=9", *mesh, devices=devices)
    assert f"from {killed}/checkpoints/4, 8 of 12 steps to go" in ran.said
    assert left(killed) == pattern
    if devices == 1:
        ends = [(run / "export/adapter/adapter_model.safetensors").read_bytes() for run in (killed, whole.folder)]
        assert ends[0] == ends[1]
        assert losses(killed) == losses(whole.folder)
    else:
        assert losses(killed) == pytest.approx(losses(whole.folder), rel=1e-5)  # rounding alone


def test_what_a_run_leaves_is_merged_trained_on_and_generated_from(place, whole):
    folder, config, options = place
    base = options[0].removeprefix("model={path: ").removesuffix("}")
    assert convert(["merge", base, str(whole.folder), str(folder / "merged")]) == 0
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole.folder / "export/adapter")
    ours = logits(*jaxllm.load_hf(folder / "merged"))
    np.testing.assert_allclose(ours, torch_logits(theirs.eval()), atol=TOLERANCE)
    np.testing.assert_allclose(logits(*opened(whole.folder)), ours, atol=TOLERANCE)

    on = train(config, f"output_dir={folder / 'on'}", *options, f"model.adapter={whole.folder}")
    assert left(on.folder) == left(whole.folder)  # what is gone weighs nothing, and goes first
    held_out = [
        [line["eval/held_out/loss"] for line in one.metrics() if "eval/held_out/loss" in line] for one in (whole, on)
    ]
    np.testing.assert_allclose(held_out[1][0], held_out[0][-1], rtol=1e-5)
    assert held_out[1][-1] < held_out[1][0]


def opened(run):
    one = open_model(run, Layout.single())
    return one.lm, one.load()


@pytest.mark.full
def test_another_length_changes_the_budget_which_is_said(place, whole):
    folder, config, options = place
    longer = [*options, "train.steps=13", f"checkpoint.resume={whole.folder}/checkpoints/8"]
    ran = train(config, f"output_dir={folder / 'longer'}", *longer)
    assert "ends at step 13 instead of 12, and so do its learning rate schedule and the budget of adalora" in ran.said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.update=fused"], "compares what it has in all layers, and train.update is fused.*set update to ord"),
        (["optim.type=schedule_free_adamw"], "evaluates an average that would keep them; choose another optimizer"),
        (["peft.lisa={active_layers: 1}"], "in all layers after each update, and peft.lisa trains a few.*remove lisa"),
        (["peft.tfinal=11"], "tinit 1 and peft.tfinal 11 leave none of the run's 12 steps"),
        (["peft.target_r=4"], "target_r is 4 and peft.init_r is 4, which leaves nothing"),
        (["peft.total_step=100"], "Did you mean .*train.steps"),
        (["model.adapter={whole}", "peft.init_r=5"], "another adapter than the peft section .*init_r: 4"),
    ],
)
def test_what_cannot_be_is_one_message(place, whole, changes, message):
    folder, config, options = place
    changes = [change.replace("{whole}", str(whole.folder)) for change in changes]
    with pytest.raises(UserError, match=message):
        train(config, f"output_dir={folder / 'refused'}", *options, *changes)
