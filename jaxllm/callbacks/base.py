"""What a callback is."""

from typing import Protocol

from jaxllm.train.state import Event


class Callback(Protocol):
    """Sees every event of a run, in the order of the callbacks."""

    def on_event(self, event: Event) -> None:
        """Called after each dispatched step; `event.state` may be read until this returns."""
        ...

    def close(self) -> None:
        """Called once, when the run ends in whatever way."""
        ...
