"""Makes the next items of an iterator in a thread while the present one is used."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")

READY_ITEMS = 4


@contextmanager
def prefetched(items: Iterator[Item], ready: int = READY_ITEMS) -> Iterator[Iterator[Item]]:
    """The same items in the same order; an exception of the iterator is raised where its item would have come.

    Args:
        items: used by the thread alone until the block ends.
        ready: items that wait at most.
    """
    waiting: queue.Queue[tuple[bool, Item | BaseException | None]] = queue.Queue(ready)
    stopped = threading.Event()

    def put(is_item: bool, value: Item | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return waiting.put((is_item, value), timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in items:
                put(True, item)
                if stopped.is_set():
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    def received() -> Iterator[Item]:
        while True:
            is_item, value = waiting.get()
            if is_item:
                yield value  # type: ignore[misc]
            elif value is None:
                return
            else:
                raise value  # type: ignore[misc]

    thread = threading.Thread(target=run, name="prefetch", daemon=True)
    thread.start()
    try:
        yield received()
    finally:
        stopped.set()
        thread.join()
