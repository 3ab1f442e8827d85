"""Batches of like length hold every row once, follow from seed and epoch, and are nearly all of one bucket."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.rows.order import Grouped, Shuffled
from jaxllm.data.rows.pack import group
from tests.data.rows.test_pack import Samples

buckets = st.lists(st.integers(0, 3), min_size=1, max_size=60).map(np.array)


@given(buckets, st.integers(1, 9), st.integers(0, 3), st.integers(0, 2))
@settings(deadline=None)
def test_every_row_stands_once_in_whole_batches(bucket: np.ndarray, batch_size: int, seed: int, epoch: int):
    order = Grouped(Shuffled(len(bucket), seed), bucket, batch_size, seed)
    rows = order(epoch)
    assert len(rows) == len(order) == -(-len(bucket) // batch_size) * batch_size
    assert sorted(rows.tolist()) == sorted([*range(len(bucket)), *[-1] * (-len(bucket) % batch_size)])
    batches = rows.reshape(-1, batch_size)
    assert (batches[:-1] >= 0).all()
    # Whole batches of one bucket, as many as there can be; what is left over is longest first and nowhere mixed more.
    uniform = [batch for batch in batches if len({*bucket[batch].tolist()}) == 1 and (batch >= 0).all()]
    most = Counter(bucket[batch[0]] for batch in uniform)
    assert all(most[b] >= count // batch_size for b, count in Counter(bucket.tolist()).items())
    assert len(batches) - len(uniform) <= 4
    assert (Grouped(Shuffled(len(bucket), seed), bucket, batch_size, seed)(epoch) == rows).all()


def test_batches_and_their_rows_differ_by_epoch_and_seed():
    bucket = np.repeat([0, 1, 2], 40)
    orders = [Grouped(Shuffled(120, seed), bucket, 8, seed)(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    for order in orders:
        first_of_batch = bucket[order.reshape(-1, 8)[:, 0]]
        assert np.count_nonzero(np.diff(first_of_batch)) > 5  # not one bucket after the other
    together = [{frozenset(batch) for batch in order.reshape(-1, 8).tolist()} for order in orders]
    assert len(together[0] & together[1]) < 3  # nor the same rows together again


def test_a_width_of_few_rows_is_given_up():
    store = Samples([(3, 1, True)] * 2 + [(7, 1, True)] * 5 + [(12, 1, True)] * 3 + [(30, 1, True)])
    packed = store.plan(32, "grouped")
    assert packed.widths == (4, 8, 16, 32)
    assert group(packed, 2, 0).widths == (4, 8, 16, 32)
    assert group(packed, 3, 0).widths == (8, 16, 32)
    assert group(packed, 7, 0).widths == (8, 32)
    assert group(packed, 100, 0).widths == (32,)
    assert len(group(packed, 4, 0).order) == 12
