"""A data set without files: random documents, and the rows that packing makes of them."""

import numpy as np

from jaxllm.data.rows.pack import Packing, PackPlan, plan
from jaxllm.data.text.tokenize import Sample

SEQ_LEN = 16


class Documents:
    """A store of random documents that fit a row, each with a prompt at its start that is not trained."""

    def __init__(self, count: int = 24, vocab_size: int = 101) -> None:
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(2, SEQ_LEN + 2, count)
        self.first_trained = np.array([rng.integers(1, length) for length in self.lengths])
        self.splittable = np.zeros(count, bool)
        self.ids = [rng.integers(0, vocab_size, length).astype(np.int32) for length in self.lengths]

    def sample(self, i: int, start: int, stop: int) -> Sample:
        return Sample(self.ids[i][start:stop], (np.arange(self.lengths[i]) >= self.first_trained[i])[start:stop])

    def origin(self, i: int) -> tuple[str, int]:
        return "file", i

    def plan(self, packing: Packing) -> PackPlan:
        masks = {"splittable": self.splittable, "first_trained": self.first_trained}
        return plan(self.lengths, seq_len=SEQ_LEN, packing=packing, seed=0, origin=str, **masks)

    def rows(self, packing: Packing) -> dict[str, np.ndarray]:
        packed = self.plan(packing)
        rows = [packed.row(self, i) for i in range(packed.rows)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
