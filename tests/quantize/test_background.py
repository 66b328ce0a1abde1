"""Work beside the main thread: done by the end of the block, its errors not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from taper.quantize.background import Background


def fail() -> None:
    raise OSError("disk full")


def run(*pieces: Callable[[], None], error: BaseException | None = None) -> None:
    with Background() as background:
        for piece in pieces:
            background.submit(piece)
        if error is not None:
            raise error


def test_all_work_is_done_at_the_end_in_order() -> None:
    done: list[int] = []
    begin = threading.Event()

    def first() -> None:
        assert begin.wait(5)
        done.append(1)

    with Background() as background:
        background.submit(first)
        begin.set()
        background.submit(lambda: done.append(2))
    assert done == [1, 2]


def test_an_error_is_raised_by_the_next_piece_or_the_end() -> None:
    ran: list[int] = []
    with pytest.raises(OSError, match="disk full"):
        run(fail, lambda: ran.append(1))
    assert ran == []
    with pytest.raises(OSError, match="disk full"):
        run(fail)


def test_an_error_of_the_block_is_the_one_that_is_seen() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(fail, error=KeyboardInterrupt())
