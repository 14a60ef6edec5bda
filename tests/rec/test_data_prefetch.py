"""Items made ahead by a thread: the same ones in the same order, errors in their place, no thread left behind."""

import itertools
import threading
import time

import pytest

from saml_rec.data.prefetch import prefetched


def names():
    return [thread.name for thread in threading.enumerate()]


def test_the_same_items_in_the_same_order():
    with prefetched(iter(range(100))) as ready:
        assert list(ready) == list(range(100))
    assert "prefetch" not in names()


def test_an_error_comes_where_its_item_would_have():
    def items():
        yield from range(3)
        raise OSError("the disk is gone")

    with prefetched(items()) as ready:
        assert list(itertools.islice(ready, 3)) == [0, 1, 2]
        with pytest.raises(OSError, match="the disk is gone"):
            next(ready)


@pytest.mark.parametrize("leave", [0, 2])
def test_who_leaves_early_leaves_no_thread(leave):
    def use():
        with prefetched(itertools.count()) as ready:
            assert list(itertools.islice(ready, leave)) == list(range(leave))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert "prefetch" not in names()


def test_no_more_than_so_many_are_made_ahead():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number

    with prefetched(items(), ready=3) as ready:
        next(ready)
        deadline = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        # One was taken, three wait, and the thread holds one more.
        assert len(made) == 5
