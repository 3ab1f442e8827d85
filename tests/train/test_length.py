"""A run of so many epochs sees each row so many times, whatever it was resumed from."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.rows.loader import START, Loader, State
from jaxllm.runs.train_config import TrainConfig
from tests.support.documents import Documents

DOCUMENTS = Documents()
PLAN = DOCUMENTS.plan("none")
SIZES = st.integers(1, 30)


def loader(batch_size: int, epochs: int, start: State = START) -> Loader:
    how = {"micro_batches": 1, "micro_batch_size": batch_size, "place": lambda arrays: arrays}
    return Loader(DOCUMENTS, PLAN, epochs=epochs, start=start, **how)


@given(SIZES, st.integers(1, 3), st.integers(0, 80), SIZES, st.integers(0, 2))
@settings(deadline=None)
def test_another_batch_size_or_more_epochs_leave_no_row_out(size: int, epochs: int, stop: int, other: int, more: int):
    first = loader(size, epochs)
    stop = min(stop, TrainConfig(epochs=epochs, batch_size=size).last_step(PLAN.rows, 0, *START))
    state = first.state_after(stop)
    rest = loader(other, epochs + more, state)
    last = TrainConfig(epochs=epochs + more, batch_size=other).last_step(PLAN.rows, stop, *state)
    seen = [*map(first.rows_of, range(stop)), *map(rest.rows_of, range(last - stop))]
    counts = Counter(row for rows in seen for row in rows.ravel().tolist() if row >= 0)
    assert counts == dict.fromkeys(range(PLAN.rows), epochs + more)
    assert last - stop == len(rest)


def test_fewer_epochs_than_were_seen_are_fewer_steps():
    assert TrainConfig(epochs=1, batch_size=4).last_step(10, 5, 2, 0) < 5
    assert TrainConfig(steps=7, batch_size=4).last_step(10, 5, 2, 0) == 7
