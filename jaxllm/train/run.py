"""One training run on one page: layout → model → data → optimizer → step → state → loop → export."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from jaxllm.callbacks.evaluate import Evaluate, EvaluationSet
from jaxllm.callbacks.log import Log, MetricsFile
from jaxllm.callbacks.save import Save
from jaxllm.checkpoint.store import CheckpointStore
from jaxllm.convert.load import RUN_CHECKPOINTS, OpenModel, open_model
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.data.loader import START, Arrays, Loader, State, plans
from jaxllm.data.pack import PackPlan
from jaxllm.data.source import describe_origin
from jaxllm.data.store import Store, open_or_build
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.evaluate.perplexity import Perplexity
from jaxllm.hf import save
from jaxllm.models import FAMILIES, LM
from jaxllm.models.layout import fit_layout
from jaxllm.models.stack import scan
from jaxllm.optim.build import build
from jaxllm.train.config import Config, NewModel
from jaxllm.train.folder import find_resume, prepare
from jaxllm.train.interrupt import Interrupt
from jaxllm.train.loop import loop
from jaxllm.train.memory import check_fits, device_bytes, out_of_memory
from jaxllm.train.metrics import flops_per_token, peak_flops
from jaxllm.train.state import abstract_state, new_state
from jaxllm.train.step import BATCH_AXES, batch_shapes, compile_step, make_step


def run(config: Config, console: Console) -> int:
    """Trains as `config` says. Returns the exit status: 0, or 128 + the signal that interrupted the run.

    Raises UserError for wrong input, before anything is written or trained where it can be known then.
    """

    def say(what: str, value: object) -> None:
        console.print(f"{what:<10}{value}", highlight=False, soft_wrap=True)

    resume = find_resume(config)
    layout = Layout.of(config.mesh)
    micro_batches, micro_batch = config.train.accumulation(layout)
    say("devices", layout)

    model, tokenizer = _open_model(config, layout)
    lm = model.lm
    say(
        "model", f"{lm.config.type} with {lm.parameter_count():,} parameters, computing in {lm.compute_dtype}"
    )
    if lm.layout.rules != layout.rules:
        say(
            "",
            f"the {lm.config.num_key_value_heads} key-value heads are held by every device of the tensor axis",
        )

    store = open_or_build(config.data.sources, tokenizer)
    plan, held_out = plans(config.data, store, config.seed)
    say("data", store.summary)
    say("", plan)
    steps = config.train.steps or -(-plan.rows * (config.train.epochs or 0) // config.train.batch_size)
    sets = _evaluation_sets(config, lm, tokenizer, store, held_out, micro_batch)

    tx, schedule = build(config.optim, steps)
    everything = jax.tree.map(lambda _: True, lm.abstract())
    state_shapes = abstract_state(lm.abstract(), everything, tx, lm.layout)
    step = make_step(
        lm, tx, schedule, stack=scan(config.train.remat), max_grad_norm=config.train.max_grad_norm
    )
    batch = batch_shapes((micro_batches, micro_batch, config.data.seq_len), lm.layout)
    with console.status("compiling the training step"):
        compiled = compile_step(step, state_shapes, batch, lm.layout)
    limit = device_bytes(jax.local_devices()[0])
    check_fits(compiled, config, micro_batch // lm.layout.size("batch"), limit)
    needs = f"{compiled.peak_bytes / 2**30:.2f} of {limit / 2**30:.1f} GiB of each device"
    say("compiled", f"the training step in {compiled.compile_s:.1f} s; it takes {needs}")

    folder = prepare(config, lm, model.folder)
    checkpoints = CheckpointStore(folder / RUN_CHECKPOINTS, keep=config.checkpoint.keep)
    if resume:
        saved = CheckpointStore(resume.checkpoints, read_only=True)
        state, facts = saved.restore(resume.step, state_shapes), saved.facts(resume.step)
        start, behind, tokens = facts["step"], State(*facts["data"]), facts["tokens"]
        say("resuming", f"from {resume}, {steps - start} of {steps} steps to go")
    else:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes)
        initial = jax.jit(
            partial(new_state, trainable=everything, tx=tx), out_shardings=shardings, donate_argnums=0
        )
        state, start, behind, tokens = initial(model.load()), 0, START, 0

    loader = Loader(
        store,
        plan,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch,
        place=partial(_place, lm.layout, BATCH_AXES),
        start=behind,
        epochs=config.train.epochs,
    )
    tokens_through = _running_total(loader.tokens_of, start, tokens)
    metrics = MetricsFile(folder / "metrics.jsonl", start)
    evaluate = Evaluate(Perplexity(lm), sets, metrics, console, last=steps)
    with ExitStack() as open_things:
        interrupt = open_things.enter_context(Interrupt())
        if start == 0:
            evaluate.before(state)
        log = Log(
            metrics,
            console,
            steps=steps,
            start=start,
            tokens_through=tokens_through,
            flops=flops_per_token(lm, config.data.seq_len),
            peak=peak_flops(lm.layout),
            first={"perf/compile_s": compiled.compile_s, "mem/planned_gib": compiled.peak_bytes / 2**30},
            records=lambda done: _records(loader, done - start - 1),
            max_bad_steps=config.train.max_bad_steps,
        )
        save_state = Save(
            checkpoints,
            config.checkpoint.every,
            lambda done: {
                "step": done,
                "data": loader.state_after(done - start),
                "tokens": tokens_through(done),
            },
        )
        callbacks = (log, evaluate, save_state)
        for callback in callbacks:
            open_things.callback(callback.close)
        batches = (batch.arrays for batch in loader)
        event = None
        try:
            for event in loop(
                compiled.run,
                state,
                batches,
                start=start,
                steps=steps,
                stop=lambda: interrupt.signal is not None,
            ):
                for callback in callbacks:
                    callback.on_event(event)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(out_of_memory(compiled, config, micro_batch, limit)) from error

    if event is not None and event.step < steps and interrupt.signal:
        say(
            "stopped",
            f"by {interrupt.signal.name} after step {event.step}; it is saved in {checkpoints.folder}",
        )
        say("", "the same command goes on from there")
        return 128 + interrupt.signal
    state = event.state if event else state
    special_ids = _special_ids(tokenizer) if isinstance(config.model, NewModel) else None
    export = folder / "export" / "hf"
    export.parent.mkdir(exist_ok=True)
    params = tree.combine(state.params, state.frozen)
    save(lm, params, export, tokenizer_folder=model.folder, special_ids=special_ids)
    for name, results in evaluate.history.items():
        say("held out", f"{name}: loss {results[0].loss:.4f} before, {results[-1].loss:.4f} after")
    say("exported", f"{export}, a folder for transformers")
    return 0


def _open_model(config: Config, layout: Layout) -> tuple[OpenModel, PreTrainedTokenizerFast]:
    """The model of the config, new or from a folder, and its tokenizer."""
    chosen, dtypes = config.model, (config.train.param_dtype, config.train.computes_in())
    if isinstance(chosen, NewModel):
        tokenizer = load_tokenizer(chosen.tokenizer)
        family_config = chosen.family_config(len(tokenizer))
        lm = LM(FAMILIES[family_config.type], family_config, fit_layout(family_config, layout), *dtypes)
        model = OpenModel(lm, Path(chosen.tokenizer), lambda: lm.init(jax.random.key(config.seed)))
    else:
        model = open_model(chosen.path, layout, *dtypes)
        if chosen.tokenizer is not None:
            model = OpenModel(model.lm, Path(chosen.tokenizer), model.load)
        tokenizer = load_tokenizer(model.folder)
    vocab_size = model.lm.config.vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer {model.folder} has {len(tokenizer):,} tokens and the model's embedding {vocab_size:,} "
            "rows; use the model's own tokenizer, or set model.vocab_size of a new model"
        )
    return model, tokenizer


def _evaluation_sets(
    config: Config,
    lm: LM,
    tokenizer: PreTrainedTokenizerFast,
    store: Store,
    held_out: PackPlan | None,
    batch_size: int,
) -> list[EvaluationSet]:
    """The held-out sets of the config, tokenized and packed."""
    sets = []
    for chosen in config.evals:
        source = chosen.source()
        if source is None:
            assert held_out is not None  # the config was checked
            rows = (store, held_out)
        else:
            own = open_or_build([source], tokenizer)
            data = config.data.model_copy(update={"sources": [source], "eval_fraction": 0.0})
            rows = (own, plans(data, own, config.seed)[0])
        loader = Loader(
            *rows,
            micro_batches=1,
            micro_batch_size=batch_size,
            place=lambda arrays: _place(
                lm.layout, BATCH_AXES[1:], {name: a[0] for name, a in arrays.items()}
            ),
            epochs=1,
            shuffle=False,
        )
        sets.append(EvaluationSet(chosen.name, partial(_arrays, loader), chosen.every))
    return sets


def _arrays(loader: Loader[Any]) -> Any:
    return (batch.arrays for batch in loader)


def _place(layout: Layout, axes: tuple[str, ...], arrays: Arrays) -> Mapping[str, jax.Array]:
    """Host arrays as global arrays of the layout."""
    sharding = layout.sharding(*axes)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in arrays.items()}


def _running_total(of: Callable[[int], int], start: int, before: int) -> Callable[[int], int]:
    """The function `step → before + of(0) + … + of(step - start - 1)`."""
    totals = [before]

    def total(step: int) -> int:
        while len(totals) <= step - start:
            totals.append(totals[-1] + of(len(totals) - 1))
        return totals[step - start]

    return total


def _records(loader: Loader[Any], batch: int) -> list[str]:
    """Where the records of a batch come from, each once."""
    origins = [origin for row in loader.origins(loader.rows_of(batch)) for origin in row]
    return [describe_origin(*origin) for origin in dict.fromkeys(origins)]


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}
