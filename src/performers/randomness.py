"""Seeds as pure functions of what they are for.

Every random draw in performers (the order of the data, the masks, dropout, the projections and their redraws) comes from a
generator whose seed is `derive_seed(seed, purpose, step, row, ...)`. So there is no generator state to save, a run continues
exactly where it was cut off, and the number of processes or the size of a batch changes nothing.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed that depends on `seed` and on every element of `path`, alike on every platform.

    Arguments:
        seed: the seed of the run.
        path: what the draw is for, as in `derive_seed(seed, "dropout", step, row)`; 1 and "1" are different elements.

    Returns:
        An integer in [0, 2^63), fit for `torch.Generator.manual_seed` and `numpy.random.Philox`.
    """
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
