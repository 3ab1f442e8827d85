"""What the methods see of the other sections of a config."""

from typing import Any, ClassVar, Protocol


class OptimSection(Protocol):
    """What they see of `optim`, whose fields are those of `optim.config.OptimizerConfig`."""

    @property
    def type(self) -> Any: ...

    needs_whole_model: ClassVar[str]
    averages: ClassVar[str]


class TrainSection(Protocol):
    """What they see of `train`, whose fields are those of `runs.train_config.TrainConfig`."""

    @property
    def update(self) -> str: ...
    @property
    def compute_dtype(self) -> str | None: ...
    @property
    def remat(self) -> Any: ...
    @property
    def unroll(self) -> Any: ...
