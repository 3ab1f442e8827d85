"""When the stages of a pipeline work, on what, and how long they wait."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """When p stages work on m micro-batches: warm_up ticks forward, steady ones forward and backward, and cool_down
    ones backward.

    virtual: v, the chunks of layers that each stage has. A tick is of one chunk, and a stage takes p micro-batches, a
    multiple of which m then is, through one chunk after the other (Narayanan et al., arXiv 2104.04473, section 2.2.2),
    see `models.gpipe.of_pass`. walks: how often each stage then walks through its layers, for
    which none waits for another.
    """

    stages: int
    micro_batches: int
    walks: int = 0
    virtual: int = 1

    @property
    def warm_up(self) -> int:
        return self.virtual * self.stages - 1

    @property
    def steady(self) -> int:
        return self.work - self.virtual * self.stages + self.stages

    @property
    def cool_down(self) -> int:
        return self.warm_up

    @property
    def work(self) -> int:
        """The passes of a stage in each direction: of m micro-batches through v chunks."""
        return self.virtual * self.micro_batches

    @property
    def bubble(self) -> float:
        """The share of the time in which a stage waits: p − 1 passes beside its own. A walk takes as long as the passes
        before it: each is three times a layer's forward pass, where passes that take the gradients of the weights too,
        and are followed by no walk, are four."""
        return (self.stages - 1) / (self.stages - 1 + self.work * (1 + self.walks))

    @property
    def metrics(self) -> dict[str, float]:
        """What a run's first line of metrics has of it."""
        return {"perf/bubble": self.bubble} if self.stages > 1 else {}

    def __str__(self) -> str:
        walks = {0: "", 1: ", and a walk of each stage", 2: ", and two walks of each stage"}[self.walks]
        stages = f"{self.stages} stages{f' of {self.virtual} chunks' if self.virtual > 1 else ''}"
        return (
            f"{stages} and {self.micro_batches} micro-batches: {self.warm_up} ticks forward, {self.steady} "
            f"forward and backward, {self.cool_down} backward{walks}; each stage waits {self.bubble:.1%} of the time"
        )
