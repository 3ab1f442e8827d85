"""What the engines of a benchmark have in common: the job, the sizes, and a worker that takes turns."""

import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS, BATCHES = "model", "batches.npy"


@dataclass(frozen=True)
class Size:
    """A Llama, and the batch that it is timed on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    batch_size: int
    seq_len: int

    def fields(self) -> dict[str, Any]:
        """The fields of config.json."""
        values = asdict(self)
        del values["batch_size"], values["seq_len"]
        return {**values, "max_position_embeddings": self.seq_len}


SIZES = {
    "tiny": Size(512, 32, 48, 2, 4, 2, False, 4, 64),
    "1M": Size(2048, 128, 344, 3, 4, 4, False, 8, 128),
    "10M": Size(8192, 256, 688, 8, 8, 8, False, 8, 256),
    "50M": Size(16384, 512, 1376, 10, 8, 8, False, 2, 512),
    "0.5B": Size(32000, 1280, 3456, 22, 20, 20, False, 8, 2048),
    "1B": Size(128256, 2048, 8192, 16, 32, 8, True, 4, 2048),
    "3B": Size(128256, 3072, 8192, 28, 24, 8, True, 2, 2048),
    "8B": Size(128256, 4096, 14336, 32, 32, 8, False, 1, 2048),
}


@dataclass(frozen=True)
class Job:
    """What is trained. folder: with `WEIGHTS`, a Hugging Face checkpoint, and `BATCHES`, int32 `[n, B, T + 1]`.

    AdamW at a constant rate; norms do not decay; gradients are clipped to a global norm.
    """

    folder: str
    param_dtype: str
    compute_dtype: str
    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def batches(self) -> np.ndarray:
        return np.load(Path(self.folder) / BATCHES)

    @property
    def weights(self) -> Path:
        return Path(self.folder) / WEIGHTS


class Engine(ABC):
    """One trainer of the job's model."""

    @abstractmethod
    def open(self) -> dict[str, Any]:
        """Loads and compiles. `compile_s`, and what else is known then."""

    @abstractmethod
    def step(self, number: int) -> float:
        """Trains on batch `number`; returns its loss when everything is done."""

    @abstractmethod
    def matmul(self, size: int) -> Callable[[], None]:
        """A product of square matrices in the compute dtype; each call waits for the result."""

    def peak_bytes(self) -> int:
        """The most memory held: of the device where it counts, else of this process."""
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def peak_flops(self) -> float:
        """The fastest of many large products, in FLOP/s."""
        size, best = 2048, float("inf")
        multiply = self.matmul(size)
        for _ in range(12):
            start = time.perf_counter()
            multiply()
            best = min(best, time.perf_counter() - start)
        return 2 * size**3 / best


def serve(engine: Callable[[Job], Engine]) -> None:
    """A worker: the job as its argument, one command a line on stdin, one answer a line on stdout.

    It sleeps in a read between its turns, so that the other engine has the machine.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    made = engine(Job(**json.loads(sys.argv[1])))
    done = 0
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "open":
                answer: Any = made.open()
            case "steps":
                answer = {"seconds": [], "losses": []}
                for number in range(done, done + command["count"]):
                    start = time.perf_counter()
                    answer["losses"].append(made.step(number))
                    answer["seconds"].append(time.perf_counter() - start)
                done += command["count"]
            case "peak_flops":
                answer = made.peak_flops()
            case "peak_bytes":
                answer = made.peak_bytes()
            case other:
                raise ValueError(other)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
