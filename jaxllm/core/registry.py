"""Named components. A component is registered beside its code; its name is then valid in a config."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from jaxllm.core.errors import UserError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from names to components of one `kind` (the word that error messages use).

    >>> greetings = Registry[str]("greeting")
    >>> greetings.add("hello", "Hello!")
    >>> greetings["hello"]
    'Hello!'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, component: T) -> None:
        """Registers `component`. Raises ValueError if the name is taken."""
        if name in self._entries:
            raise ValueError(f"the {self.kind} {name!r} is registered twice")
        self._entries[name] = component

    def __getitem__(self, name: str) -> T:
        """The component called `name`. Raises UserError naming the closest one."""
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise UserError(f"unknown {self.kind} {name!r}.{did_you_mean(name, self._entries)} Known: {known}.")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)
