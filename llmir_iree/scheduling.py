"""How the thread that calls a module shares the cores with the runtime's workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def behind_workers() -> Iterator[None]:
    """Let this thread wake without pushing a worker from its core.

    The worker that finishes a call wakes the caller from inside a callback, and the caller spins until the callback has
    returned (`iree_async_semaphore_multi_wait`, runtime/src/iree/async/semaphore.c). With a worker on every core, Linux
    may run the caller in the place of that very worker: the caller then spins through a whole time slice, several
    milliseconds, for a worker that waits for its core. A thread of the batch class preempts nobody when it wakes.

    Does nothing where there is no such class, and to threads that are in another class already.
    """
    if sys.platform != "linux":
        yield
        return
    ordinary = os.sched_getscheduler(0) == os.SCHED_OTHER
    if ordinary:
        _enter(os.SCHED_BATCH)
    try:
        yield
    finally:
        if ordinary:
            _enter(os.SCHED_OTHER)


def _enter(policy: int) -> None:
    """Put this thread into a scheduling class; a sandbox may forbid it, which costs speed only."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, policy, os.sched_param(0))
