"""How processes that torchrun has started, perhaps not for the first time, find each other: a store of their own comes out.

torchrun keeps one key-value store over all restarts, and process groups write their addresses to it. A process that is started
again may read there the address of one that was killed, and wait for it in vain. So those of an attempt first agree on a name of
this attempt, and keep everything under it.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed has them, and declares neither

from performers.errors import RunError

_LEADER = "performers/leader"
_PAUSE = 0.01  # seconds


def meet(store: Store, rank: int, size: int, patience: timedelta) -> Store:
    """The part of `store` that belongs to this attempt of `size` processes; all of them ask.

    The first process, whose name is new, waits until each of the others has answered to that name, and lists the answers, which
    are new as well. Another one goes on when it finds its own among them: those of an earlier attempt never hold it.

    Arguments:
        store: what all attempts share.
        rank: the number of this process, from 0.
        size: how many processes there are.
        patience: how long to wait for the others.

    Raises:
        RunError: not all of them came.
    """
    own = uuid.uuid4().hex
    deadline = time.monotonic() + patience.total_seconds()
    others = [f"performers/{own}/{other}" for other in range(1, size)]
    if rank == 0:
        store.set(_LEADER, own)
    while time.monotonic() < deadline:
        if rank == 0:
            if all(store.check([key]) for key in others):
                store.set(f"performers/{own}/all", " ".join(store.get(key).decode() for key in others))
                return PrefixStore(own, store)
        elif store.check([_LEADER]):
            leader = store.get(_LEADER).decode()
            store.set(f"performers/{leader}/{rank}", own)
            everyone = f"performers/{leader}/all"
            if store.check([everyone]) and own in store.get(everyone).decode().split():
                return PrefixStore(leader, store)
        time.sleep(_PAUSE)
    raise RunError(f"The {size} processes of the run did not meet within {patience.total_seconds():.0f} seconds.")
