"""When a run saves, and which checkpoints stay."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from jaxllm.core.config import OnResume, Section

# The last word of a metric → which of its values is best.
DIRECTIONS: dict[str, Literal["min", "max"]] = {"loss": "min", "perplexity": "min", "accuracy": "max"}


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    every: PositiveInt | None = None
    """steps between checkpoints; null: only at the end, and when the run is interrupted"""
    keep: PositiveInt = 2
    """how many of the newest stay"""
    keep_every: PositiveInt | None = None
    """those of every so many steps stay for good"""
    best: str | None = None
    """a metric such as eval/held_out/loss: the checkpoint with its best value stays, and checkpoints/best names it"""
    best_mode: Literal["min", "max"] | None = None
    """whether the least or the greatest value is best; default: min for a loss or perplexity, max for an accuracy"""
    resume: Annotated[str, OnResume.FREE] = Field(default="auto", min_length=1)
    """auto: go on from the newest checkpoint of output_dir, if there is one; none: output_dir must be new;
    otherwise a checkpoint to go on from: <run>/checkpoints/<step>, /best or /latest"""

    @model_validator(mode="after")
    def _consistent(self) -> "CheckpointConfig":
        every = self.every
        if every is None:
            for name in ("keep_every", "best"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} chooses among checkpoints, and every is null; set every")
        elif self.keep_every is not None and self.keep_every % every:
            near = sorted({max(1, self.keep_every // every) * every, -(-self.keep_every // every) * every})
            raise ValueError(
                f"keep_every {self.keep_every} is not a multiple of every {every}; set it to "
                f"{' or '.join(map(str, near))}"
            )
        if self.best is not None and self.best_mode is None and self._last_word() not in DIRECTIONS:
            raise ValueError(f"best {self.best}: set best_mode to min or max")
        return self

    def best_of(self, scores: Mapping[int, float]) -> int | None:
        """The step with the best of `scores`, the first of equals; None without a finite one."""
        finite = {step: score for step, score in sorted(scores.items()) if math.isfinite(score)}
        if self.best is None or not finite:
            return None
        mode = self.best_mode or DIRECTIONS[self._last_word()]
        return (min if mode == "min" else max)(finite, key=lambda step: finite[step])

    def kept(self, steps: Iterable[int], best: int | None) -> set[int]:
        """Those of `steps` whose checkpoints stay."""
        steps = sorted(steps)
        for_good = {step for step in steps if self.keep_every is not None and step % self.keep_every == 0}
        return {*steps[-self.keep :], *for_good, *(step for step in steps if step == best)}

    def _last_word(self) -> str:
        return (self.best or "").rpartition("/")[2]
