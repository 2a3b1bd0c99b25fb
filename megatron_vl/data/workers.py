"""Processes that work for another one, and must not outlive it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_parent() -> None:
    """To be called in a spawned worker, as (part of) the initializer of its pool: it ends when its parent does.

    A parent that was killed outright, or left by os._exit as a watchdog does, tells nobody; its workers would wait
    for tasks for ever. The kernel closes the parent's end of a pipe whatever way it dies, on every system.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
