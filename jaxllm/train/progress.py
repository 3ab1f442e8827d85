"""How far a run is: rows, tokens and records behind it, from what its loader gives out."""

from typing import Any

from jaxllm.data.records.source import describe_origin
from jaxllm.data.rows.loader import Loader
from jaxllm.runs.resume import Facts


class Progress:
    """What is behind after each step of a run that goes on, or begins, from `began` with the batches of `loader`."""

    def __init__(self, began: Facts, loader: Loader[Any]) -> None:
        self.began = began
        self._loader = loader
        self._tokens = [began.tokens]

    def tokens_through(self, step: int) -> int:
        """The real tokens seen through `step`."""
        batches = step - self.began.step
        while len(self._tokens) <= batches:
            self._tokens.append(self._tokens[-1] + self._loader.tokens_of(len(self._tokens) - 1))
        return self._tokens[batches]

    def facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` says beside the state."""
        place = self._loader.state_after(step - self.began.step)._asdict()
        now = {"step": step, **place, "tokens": self.tokens_through(step)}
        return self.began.model_copy(update=now).model_dump()

    def records(self, step: int) -> list[str]:
        """Where the records of a step's batch come from, each once."""
        rows = self._loader.rows_of(step - self.began.step - 1)
        origins = (origin for row in self._loader.origins(rows) for origin in row)
        return [describe_origin(*origin) for origin in dict.fromkeys(origins)]
