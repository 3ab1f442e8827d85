"""Best-fit decreasing bin packing."""

import numpy as np


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing bin packing: the bin of each item, int64 [n], bins counted from 0.

    Items come in order of falling size, and each goes into the bin with the least room that still holds it.
    Bins with equal room are alike, and so are items of equal size: both are handled in groups, which takes
    O(n + capacity²) array steps at the very worst, and nearer to O(n + capacity) on real lengths.
    """
    items = np.argsort(-sizes, kind="stable")
    counts = np.bincount(sizes, minlength=capacity + 1)
    bins_by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    has_bins = np.zeros(capacity + 1, bool)
    assigned = np.empty(len(sizes), np.int64)
    opened = done = 0

    def put(room: int, bins: np.ndarray) -> None:
        if len(bins):
            bins_by_room[room].append(bins)
            has_bins[room] = True

    for size in np.flatnonzero(counts)[::-1]:
        left = int(counts[size])
        while left:
            room = size + int(np.argmax(has_bins[size:]))
            if has_bins[room]:
                bins = np.concatenate(bins_by_room[room])
                bins_by_room[room], has_bins[room] = [], False
            else:
                room = capacity
                bins = np.arange(opened, opened - (-left // (capacity // size)))
                opened += len(bins)
            each = room // size  # the bin just used has the least room of all, until it is too full
            full, rest = divmod(min(left, each * len(bins)), each)
            used = full * each + rest
            assigned[items[done : done + used]] = np.repeat(bins, each)[:used]
            put(room - each * size, bins[:full])
            if rest:
                put(room - rest * size, bins[full : full + 1])
            put(room, bins[full + bool(rest) :])
            done, left = done + used, left - used
    return assigned
