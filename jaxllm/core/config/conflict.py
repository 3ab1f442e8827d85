"""Settings of different sections that contradict each other."""

from typing import NamedTuple


class Conflict(NamedTuple):
    """Why two settings contradict each other, and what to set instead."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"
