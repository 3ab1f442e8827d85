"""A model's parameters by the modules of transformers that hold them, which is how HF PEFT chooses and names them."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxllm.models.lm import LM
from jaxllm.models.rules import Operation


@dataclass(frozen=True)
class Module:
    """What holds a parameter in transformers.

    path: of the parameter. names: of the module, such as `model.layers.0.self_attn.q_proj`, one for each layer of a
    stacked parameter. kind: what the module calls it, `weight` or `bias`. operation: on the way to the file. alias: the
    name of another module that holds the same parameter: of a tied embedding, the head.
    """

    path: str
    names: tuple[str, ...]
    kind: str
    stacked: bool
    operation: Operation
    alias: str | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of a layer."""
        return self.stacked and self.path.endswith("/kernel")

    @property
    def is_embedding(self) -> bool:
        """Whether it is the embedding, whose table is a matrix `[vocab, D]`."""
        return self.path == "embed/table"

    @property
    def is_outer(self) -> bool:
        """Whether it is a matrix outside of the layers: the embedding or the head."""
        return self.is_embedding or self.path == "head/kernel"

    @property
    def folder(self) -> str:
        """The path of what stands beside the parameter."""
        return self.path.rpartition("/")[0]

    @property
    def short(self) -> str:
        """The last part of the name, such as `q_proj`."""
        return self.names[0].rpartition(".")[2]

    def keys(self) -> tuple[str, ...]:
        """The parameter's name, one for each layer."""
        return tuple(f"{name}.{self.kind}" for name in self.names)


def modules(lm: LM) -> list[Module]:
    """Every parameter of `lm`, those that an adapter adds left out."""
    found = []
    for rule in lm.family.rules(lm.config):
        name, _, kind = rule.key.rpartition(".")
        layers = range(lm.config.num_hidden_layers) if rule.stacked else (0,)
        names = tuple(name.replace("{i}", str(i)) for i in layers)
        alias = rule.alias and rule.alias.rpartition(".")[0]
        found.append(Module(rule.path, names, kind, rule.stacked, rule.operation, alias))
    return found


def holders(name: str) -> list[str]:
    """The module `name` and those that it is a part of: `a.b.c`, `a.b` and `a`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def ends(name: str) -> list[str]:
    """The name `a.b.c`, and what is behind its dots: `b.c` and `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def is_named(name: str, wanted: Iterable[str]) -> bool:
    """Whether a module is meant by one of `wanted`: its name, or the end of it after a dot."""
    return not {*wanted}.isdisjoint(ends(name))
