"""Calls run in the batch class, and leave the thread as they found it."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from llmir_iree.scheduling import behind_workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scheduling classes are Linux's")


def test_a_call_runs_in_the_batch_class() -> None:
    with behind_workers():
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_the_class_is_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError), behind_workers():
        raise RuntimeError
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_other_threads_keep_their_class() -> None:
    classes: list[int] = []
    inside, asked = threading.Event(), threading.Event()

    def look() -> None:
        inside.wait(10)
        classes.append(os.sched_getscheduler(0))
        asked.set()

    thread = threading.Thread(target=look)
    thread.start()
    with behind_workers():
        inside.set()
        assert asked.wait(10)
    thread.join()
    assert classes == [os.SCHED_OTHER]


def test_a_thread_of_another_class_is_left_alone() -> None:
    def run() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with behind_workers():
            classes.append(os.sched_getscheduler(0))
        classes.append(os.sched_getscheduler(0))

    classes: list[int] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert classes == [os.SCHED_IDLE, os.SCHED_IDLE]
