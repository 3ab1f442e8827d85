"""One training run on one page: layout → model → data → optimizer → step → state → loop → export."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxllm.checkpoint.run_files import AUTOTUNED, RUN_CHECKPOINTS, check_seal
from jaxllm.core import tree
from jaxllm.core.compilation_cache import programs_read
from jaxllm.core.console import saying
from jaxllm.core.finite import ANOTHER, check_finite
from jaxllm.core.mesh import Layout
from jaxllm.data.rows.loader import State
from jaxllm.data.text.kept_template import kept_template
from jaxllm.files import hub
from jaxllm.files.side_files import check_kept
from jaxllm.hf.export import check_replaceable
from jaxllm.kernels.attention_choice import choose_attention
from jaxllm.processes.distributed import require_same
from jaxllm.processes.interrupt import Interrupt
from jaxllm.runs.config import Config
from jaxllm.runs.folder import disk_errors, prepare
from jaxllm.runs.lock import owned
from jaxllm.runs.resume import Facts, find_resume
from jaxllm.step.batch import check_length
from jaxllm.step.xla_options import describe_determinism, describe_options
from jaxllm.train.callbacks import Callbacks
from jaxllm.train.inputs import evaluation_sets, read_inputs, training_loader
from jaxllm.train.loop import loop
from jaxllm.train.memory import check_fits, device_bytes, memory_errors, out_of_memory, untried_advice
from jaxllm.train.model import open_chosen_model, say_model
from jaxllm.train.program import Program
from jaxllm.train.progress import Progress
from jaxllm.train.result import check_trained, export


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
    say, folder, train = saying(console), Path(config.output_dir), config.train
    resume = find_resume(config)
    require_same("where the run goes on from", resume)
    train.check_dtypes()
    layout = Layout.of(config.mesh, devices)
    accumulation = train.accumulation(layout)
    check_length(config.data.seq_len, layout)
    train.check_memories(layout.mesh.local_devices[0])
    say("devices", layout)
    ticks = train.ticks(layout.stages, accumulation.micro_batches)
    if layout.stages > 1:
        say("pipeline", ticks)

    model = open_chosen_model(config, layout)
    lm, tokenizer = model.lm, model.tokenizer()
    say_model(model, config, layout, say)
    goes_on = resume is not None and resume.run.resolve() == folder.resolve()
    if not goes_on:
        check_kept(model.folder)
    check_replaceable(folder / config.peft.exported_to, lm.source, adapter=config.peft.files is not None)

    day, held_out_by = (resume.day, resume.facts.held_out_by) if resume else (None, "records")
    inputs = read_inputs(config, tokenizer, say, day, held_out_by)
    store, plan = inputs.train
    chat_template, remark = kept_template(config.data.sources, [*store.summary.formats.values()], tokenizer)
    if remark:
        say("note", remark)
    seen = (resume.facts.step, resume.facts.epoch, resume.facts.position) if resume else (0, 0, 0)
    steps = train.last_step(len(plan.order), *seen)
    sets = evaluation_sets(config.evals, inputs.held_out, lm.layout, accumulation)
    if resume:
        for note in resume.check(config, lm.config, store.key, tokenizer, steps):
            say("note", note)

    attention = choose_attention(train.attention, lm.attention_needs(config.data.packed))
    lm = replace(lm, attention=attention.form)
    say("attention", attention)

    program = Program.of(config, lm, steps)
    say("rate", config.optim.schedule.describe(config.optim.learning_rate, steps))
    if options := program.compiler_options(folder / AUTOTUNED):
        say("xla", describe_options(options))
    if train.deterministic:
        say("same bits", describe_determinism(folder / AUTOTUNED, layout.platform))
    with console.status("compiling the training step"), programs_read() as read:
        compiled = program.compile(accumulation, plan.widths, options)
    limit = device_bytes(lm.layout.mesh.local_devices[0])

    def advice() -> str:
        return untried_advice(config, accumulation.rows // layout.size("batch"))

    check_fits(compiled, limit, advice)
    needs = f"{compiled.peak_bytes / 2**30:.2f} of {limit / 2**30:.1f} GiB of each device"
    from_cache = ", read from the cache" if read else ""
    say("compiled", f"the training step in {compiled.compile_s:.1f} s{from_cache}; it takes {needs}")

    with ExitStack() as stack:
        stack.enter_context(memory_errors(lambda: out_of_memory(compiled, limit, advice())))
        stack.enter_context(disk_errors(folder))
        if resume:
            state, began = program.arranged(resume.restore(program.state, lm.paddable)), resume.facts
            say("resuming", f"from {resume}, {steps - began.step} of {steps} steps to go")
        else:
            state = program.start(model.load())
            began = Facts(step=0, steps=steps, epoch=0, position=0, tokens=0, data=store.key)
        drawn = {"day": str(inputs.day), "held_out_by": inputs.held_out_by}
        began = began.model_copy(update={"steps": steps, "data": store.key, **drawn})
        weights_of = f"{resume or hub.shown(model.folder)}: the weights are not finite"
        check_finite(tree.combine(state.params, state.frozen), weights_of, ANOTHER)
        applied_before = int(state.step)
        prepare(config, lm, model.folder, tokenizer, chat_template=chat_template, keep_model=goes_on)

        loader = training_loader(
            inputs.train,
            lm.layout,
            micro_batches=accumulation.micro_batches,
            micro_batch_size=accumulation.rows,
            start=State(began.epoch, began.position),
            epochs=train.epochs,
        )
        stack.enter_context(interrupt.graceful())
        planned = {"perf/compile_s": compiled.compile_s, "mem/planned_gib": compiled.peak_bytes / 2**30}
        callbacks = Callbacks(
            stack,
            program,
            Progress(began, loader),
            sets,
            console,
            state,
            resumed=resume is not None,
            first=planned | ticks.metrics,
            stop=interrupt.stopped,
        )
        events = loop(
            compiled.run,
            state,
            (batch.arrays for batch in loader),
            start=began.step,
            steps=steps,
            settle=callbacks.settles,
            stop=interrupt.stopped,
        )
        done = began.step
        for event in events:
            callbacks.on_event(event)
            done, state = event.step, event.state

    if interrupt.signal is not None:
        where = f"; it is saved in {(folder / RUN_CHECKPOINTS).absolute()}" if done > began.step else ""
        say("stopped", f"by {interrupt.signal.name} after step {done}{where}")
        say("", "the same command goes on from there")
        return 128 + interrupt.signal
    check_seal(folder)
    check_trained(folder, done - began.step, applied_before, int(state.step))
    export(program, state, callbacks.evaluated, say)
    return 0
