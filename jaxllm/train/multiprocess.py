"""A run of several processes: each starts with the same arguments, and none goes on without the others."""

from collections.abc import Sequence

from rich.console import Console

from jaxllm.core.config import load
from jaxllm.core.errors import UserError
from jaxllm.processes.distributed import joined
from jaxllm.processes.interrupt import Interrupt
from jaxllm.processes.launch import Place
from jaxllm.processes.rendezvous import Ended
from jaxllm.processes.watch import DistributedConfig
from jaxllm.runs.config import Config
from jaxllm.runs.config_changes import values_of
from jaxllm.train.run import run


def train_together(place: Place, arguments: Sequence[str]) -> int:
    """Trains as the config in `arguments` says, as the process `place`. Returns the exit status, as of one process."""
    config, wrong = None, None
    try:
        config = load(arguments[0], arguments[1:], Config)
    except UserError as error:
        wrong = error  # process 0 says it for all
    facts = {} if config is None else values_of(config)
    console = Console(quiet=place.process_id != 0)
    try:
        with joined(place, facts, config.distributed if config else DistributedConfig(), wrong) as watch:
            assert config is not None  # or the processes have ended
            watch.before_end(console.show_cursor)
            with Interrupt(console, watch) as interrupt:
                return run(config, console, interrupt=interrupt)
    except Ended as ended:
        return ended.status
