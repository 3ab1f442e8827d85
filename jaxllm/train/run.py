"""One training run on one page: layout → model → data → optimizer → step → state → loop → export."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console

from jaxllm.callbacks.base import Callback
from jaxllm.callbacks.evaluate import Evaluate
from jaxllm.callbacks.log import Log, MetricsFile
from jaxllm.callbacks.save import Save
from jaxllm.checkpoint.run_files import RUN_CHECKPOINTS, RUN_MODEL, check_seal
from jaxllm.checkpoint.writer import CheckpointWriter
from jaxllm.core import tree
from jaxllm.core.compilation_cache import programs_read
from jaxllm.core.console import saying
from jaxllm.core.errors import UserError
from jaxllm.core.finite import ANOTHER, check_finite
from jaxllm.core.hardware import peak_flops
from jaxllm.core.mesh import Layout
from jaxllm.data.rows.loader import State
from jaxllm.data.text.kept_template import kept_template
from jaxllm.evaluate.perplexity import Perplexity
from jaxllm.files import hub
from jaxllm.files.side_files import check_kept
from jaxllm.hf.export import check_replaceable
from jaxllm.kernels.attention_choice import choose_attention
from jaxllm.peft.files import AdapterConfig
from jaxllm.processes.distributed import is_first, require_same
from jaxllm.processes.interrupt import Interrupt
from jaxllm.runs.config import Config
from jaxllm.runs.folder import AUTOTUNED, METRICS, prepare
from jaxllm.runs.lock import owned
from jaxllm.runs.model_config import PretrainedModel
from jaxllm.runs.resume import Facts, find_resume
from jaxllm.step.batch import check_length
from jaxllm.step.xla_options import describe_determinism, describe_options
from jaxllm.train.inputs import evaluation_sets, read_inputs, records_of, training_loader
from jaxllm.train.loop import loop
from jaxllm.train.memory import check_fits, device_bytes, out_of_memory, untried_advice
from jaxllm.train.metrics import flops_per_token
from jaxllm.train.model import open_chosen_model, say_model
from jaxllm.train.program import Program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run(
    config: Config, console: Console, devices: Sequence[Any] | None = None, interrupt: Interrupt | None = None
) -> int:
    """Trains as `config` says, on `devices` (default: all). Returns the exit status: 0, or 128 + the signal that
    `interrupt` noted (default: signals do what they do in the calling program).

    Raises UserError for wrong input, before anything is written or trained where it can be known then.
    """
    with owned(Path(config.output_dir)):
        return _run(config, console, devices, interrupt or Interrupt(console))


def _run(config: Config, console: Console, devices: Sequence[Any] | None, interrupt: Interrupt) -> int:

    say = saying(console)
    resume = find_resume(config)
    require_same("where the run goes on from", resume)
    config.train.check_dtypes()
    layout = Layout.of(config.mesh, devices)
    micro_batches, micro_batch = config.train.accumulation(layout)
    check_length(config.data.seq_len, layout)
    config.train.check_memories(layout.mesh.local_devices[0])
    say("devices", layout)
    ticks = config.train.ticks(layout)
    if layout.stages > 1:
        say("pipeline", ticks)

    model = open_chosen_model(config, layout)
    lm, tokenizer = model.lm, model.tokenizer()
    say_model(model, config, layout, say)
    own_tokenizer = lm.source is not None and model.folder == lm.source.folder
    special_ids = None if own_tokenizer else _special_ids(tokenizer)
    folder = Path(config.output_dir)
    goes_on = resume is not None and resume.run.resolve() == folder.resolve()
    if not goes_on:
        check_kept(model.folder)
    check_replaceable(folder / config.peft.exported_to, lm.source, adapter=isinstance(config.peft, AdapterConfig))

    day, held_out_by = (resume.day, resume.facts.held_out_by) if resume else (None, "records")
    inputs = read_inputs(config, tokenizer, say, day, held_out_by)
    store, plan = inputs.train
    chat_template, remark = kept_template(config.data.sources, [*store.summary.formats.values()], tokenizer)
    if remark:
        say("note", remark)
    seen = (resume.facts.step, resume.facts.epoch, resume.facts.position) if resume else (0, 0, 0)
    steps = config.train.last_step(len(plan.order), *seen)
    sets = evaluation_sets(config, inputs.held_out, lm.layout)
    if resume:
        for note in resume.check(config, lm, store.key, tokenizer, steps):
            say("note", note)

    attention = choose_attention(config.train.attention, lm.attention_needs(config.data.packed))
    lm = replace(lm, attention=attention.form)
    say("attention", attention)

    program = Program.of(config, lm, steps)
    say("rate", config.optim.schedule.describe(config.optim.learning_rate, steps))
    if options := program.compiler_options(folder / AUTOTUNED):
        say("xla", describe_options(options))
    if config.train.deterministic:
        say("same bits", describe_determinism(folder / AUTOTUNED, layout.platform))
    with console.status("compiling the training step"), programs_read() as read:
        compiled = program.compile(plan.widths, options)
    limit = device_bytes(lm.layout.mesh.local_devices[0])
    per_device = micro_batch // lm.layout.size("batch")

    def advice() -> str:
        return untried_advice(config, per_device)

    check_fits(compiled, limit, advice)
    needs = f"{compiled.peak_bytes / 2**30:.2f} of {limit / 2**30:.1f} GiB of each device"
    from_cache = ", read from the cache" if read else ""
    say("compiled", f"the training step in {compiled.compile_s:.1f} s{from_cache}; it takes {needs}")

    with ExitStack() as open_things:
        open_things.enter_context(_clear_errors(folder, lambda: out_of_memory(compiled, limit, advice())))
        if resume:
            state, facts = program.arranged(resume.restore(program.state, lm.paddable)), resume.facts
            say("resuming", f"from {resume}, {steps - facts.step} of {steps} steps to go")
        else:
            state = program.start(model.load())
            facts = Facts(step=0, steps=steps, epoch=0, position=0, tokens=0, data=store.key)
        weights_of = f"{resume or hub.shown(model.folder)}: the weights are not finite"
        check_finite(tree.combine(state.params, state.frozen), weights_of, ANOTHER)
        applied_before = int(state.step)
        prepare(config, lm, model.folder, special_ids, chat_template=chat_template, keep_model=goes_on)

        start = facts.step
        loader = training_loader(
            inputs.train,
            lm.layout,
            micro_batches=micro_batches,
            micro_batch_size=micro_batch,
            start=State(facts.epoch, facts.position),
            epochs=config.train.epochs,
        )
        tokens_through = _running_total(loader.tokens_of, start, facts.tokens)

        def facts_at(done: int) -> dict[str, Any]:
            place, tokens = loader.state_after(done - start)._asdict(), tokens_through(done)
            day, drawn = str(inputs.day), inputs.held_out_by
            facts = Facts(step=done, steps=steps, **place, tokens=tokens, data=store.key, day=day, held_out_by=drawn)
            return facts.model_dump()

        open_things.enter_context(interrupt.graceful())
        resumed_at = start if resume else None
        own = config.callbacks if is_first() else ()
        chosen = [open_things.enter_context(closing(c.open(folder, resumed_at))) for c in own]
        metrics = open_things.enter_context(closing(MetricsFile(folder / METRICS, resumed_at, chosen)))
        for note in metrics.notes:
            say("note", note)
        checkpoints = CheckpointWriter(folder / RUN_CHECKPOINTS, config.checkpoint, lm.layer_order, lm.paddable)
        save = open_things.enter_context(closing(Save(checkpoints, config.checkpoint, facts_at, metrics)))
        evaluate = Evaluate(Perplexity(lm), program.weights, sets, metrics, console, last=steps, stop=interrupt.stopped)
        evaluate.before(state, start)
        log = Log(
            metrics,
            console,
            steps=steps,
            start=start,
            norms_every=config.metrics.norms_every,
            tokens_through=tokens_through,
            flops=flops_per_token(lm, config.data.seq_len, config.peft.trained_at_a_time(lm)),
            peak=peak_flops(lm.layout),
            first={"perf/compile_s": compiled.compile_s, "mem/planned_gib": compiled.peak_bytes / 2**30}
            | ticks.metrics,
            records=lambda done: records_of(loader, done - start - 1),
            max_bad_steps=config.train.max_bad_steps,
        )
        open_things.enter_context(closing(log))

        callbacks: tuple[Callback, ...] = (log, evaluate, save, *chosen)
        intervals = [config.checkpoint.every, *(held_out.every for held_out in config.evals)]
        events = loop(
            compiled.run,
            state,
            (batch.arrays for batch in loader),
            start=start,
            steps=steps,
            settle=lambda done: any(every and done % every == 0 for every in intervals),
            stop=interrupt.stopped,
        )
        done = start
        for event in events:
            for callback in callbacks:
                callback.on_event(event)
            done, state = event.step, event.state

    if interrupt.signal is not None:
        where = f"; it is saved in {checkpoints.folder}" if done > start else ""
        say("stopped", f"by {interrupt.signal.name} after step {done}{where}")
        say("", "the same command goes on from there")
        return 128 + interrupt.signal
    check_seal(folder)
    _check_trained(done - start, applied_before, int(state.step), folder)
    base = config.model.path if isinstance(config.model, PretrainedModel) else None
    exported = folder / config.peft.exported_to
    config.peft.export(lm.plain, program.exported(state), exported, model_folder=folder / RUN_MODEL, base=base)
    for name, results in evaluate.history.items():
        said = ", ".join(f"{result.loss:.4f} at step {at}" for at, result in (results[0], results[-1]))
        say("held out", f"{name}: loss {said}")
    say("exported", f"{exported}, a folder for {config.peft.exported_for}")
    return 0


def _check_trained(steps: int, before: int, after: int, folder: Path) -> None:
    """Raises UserError where nothing was trained. before, after: updates applied, around these steps and in all."""
    if after == 0 or (steps and after == before):
        raise UserError(
            f"{folder}: none of the {steps or 'earlier'} steps was applied, because each had a loss, gradient or "
            f"parameter norm that is not finite (see {METRICS}); nothing was exported. Look at the records of these "
            "steps, or start again in a new output_dir with a lower optim.learning_rate"
        )


@contextmanager
def _clear_errors(folder: Path, out_of_memory: Callable[[], str]) -> Iterator[None]:
    """Turns a full device or disk into one message."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(out_of_memory()) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"output_dir {folder} cannot be written: {error.strerror}. Free some space; the same command goes on from "
            "the newest checkpoint"
        ) from error


def _running_total(of: Callable[[int], int], start: int, before: int) -> Callable[[int], int]:
    """The function `step → before + of(0) + … + of(step - start - 1)`."""
    totals = [before]

    def total(step: int) -> int:
        while len(totals) <= step - start:
            totals.append(totals[-1] + of(len(totals) - 1))
        return totals[step - start]

    return total


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}
