"""What a run leaves when all of its steps are done: the exported model or adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxllm.checkpoint.run_files import METRICS, RUN_MODEL
from jaxllm.core.console import Say
from jaxllm.core.errors import UserError
from jaxllm.evaluate.perplexity import HeldOut
from jaxllm.step.state import TrainState
from jaxllm.train.program import Program


def check_trained(folder: Path, steps: int, before: int, after: int) -> None:
    """Raises UserError where nothing was trained. before, after: updates applied, around these steps and in all."""
    if after == 0 or (steps and after == before):
        raise UserError(
            f"{folder}: none of the {steps or 'earlier'} steps was applied, because each had a loss, gradient or "
            f"parameter norm that is not finite (see {METRICS}); nothing was exported. Look at the records of these "
            "steps, or start again in a new output_dir with a lower optim.learning_rate"
        )


def export(
    program: Program, state: TrainState, evaluated: Mapping[str, Sequence[tuple[int, HeldOut]]], say: Say
) -> None:
    """Writes what was trained for the library that loads it, and says where it is and how it was evaluated.

    evaluated: by the name of a held-out set, the step and result of each evaluation. The buffers of `state` are given
    up.
    """
    config, method = program.config, program.config.peft
    run = Path(config.output_dir)
    folder, started_from = run / method.exported_to, config.model.path
    method.export(program.lm.plain, program.exported(state), folder, model_folder=run / RUN_MODEL, base=started_from)
    for name, results in evaluated.items():
        said = ", ".join(f"{result.loss:.4f} at step {at}" for at, result in (results[0], results[-1]))
        say("held out", f"{name}: loss {said}")
    say("exported", f"{folder}, a folder for {method.exported_for}")
