"""Drives a ``step`` over ragged streams that begin and end at different times, as an engine would."""

import torch


def drive(step, state, items, first, later, waits=None, late=False):
    """Feed every item as one stream of a batch.

    Args:
        step: (x (B, C, ...), lengths (B,), state, final (B,)) -> (y (B, U, ...), lengths (B,), state).
        items: one tensor (T, ...) a row.
        first, later: inputs of a stream's first step and of every other one.
        waits: ticks after which each row begins; before and after its stream a row is fed nothing.
        late: whether the end of a stream is only known one step after its last full chunk.

    Returns:
        one tensor a row, and the state after the last step.
    """
    waits = waits or [0] * len(items)
    place, done = [0] * len(items), [False] * len(items)
    outputs = [[] for _ in items]
    width, tick = max(first, later), 0
    while not all(done):
        # What lies beyond a row's length must not matter: here it would make everything NaN.
        x = torch.full((len(items), width, *items[0].shape[1:]), float("nan"))
        lengths, final = torch.zeros(len(items), dtype=torch.int64), torch.zeros(len(items), dtype=torch.bool)
        for row, item in enumerate(items):
            if tick < waits[row] or done[row]:
                continue
            size = later if place[row] else first
            new = item[place[row] : place[row] + size]
            x[row, : len(new)], lengths[row] = new, len(new)
            place[row] += len(new)
            done[row] = len(new) < size or (place[row] == len(item) and not late)
            final[row] = done[row]
        y, counts, state = step(x, lengths, state, final)
        for row, count in enumerate(counts.tolist()):
            outputs[row].append(y[row, :count])
        tick += 1
    return [torch.cat(parts) for parts in outputs], state


def same_tensors(got, want):
    """Whether two states hold the same tensors, shapes and dtypes."""
    from nar_speech.layers.state import named_tensors

    ours, theirs = dict(named_tensors(got)), dict(named_tensors(want))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    return True
