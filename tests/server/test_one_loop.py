"""The loop of one request at a time: order, deadlines, bounds, and what remains at the end."""

from __future__ import annotations

import math
import threading
import time

import pytest

from taper import load
from taper.engine.schedule import Terms
from taper.server.errors import ApiError
from taper.server.one_loop import OneLoop
from taper.server.serving import Ended, Refused
from taper.testing.tiny import tiny_taper


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return load(tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper"))


@pytest.fixture
def loop(llm):
    made = OneLoop(llm.engine, max_waiting=2)
    yield made
    made.close()


class Client:
    """Keeps the events of a request; each token takes `step_s`."""

    def __init__(self, loop, llm, terms=None, step_s=0.0, **options):
        self.steps, self.last, self.ended = [], None, threading.Event()
        self.began = threading.Event()
        self._step_s = step_s
        request = llm.request([5, 6], **{"policy": "fixed:6", "max_tokens": 8, "ignore_eos": True, **options})
        self.id = loop.submit(request, terms or Terms(), self._take)

    def _take(self, event):
        if isinstance(event, (Ended, Refused)):
            self.last = event
            self.ended.set()
        else:
            self.began.set()
            self.steps.append(event)
            time.sleep(self._step_s)

    def wait(self):
        assert self.ended.wait(10)
        return self.last


def test_an_answer_is_the_engines_and_the_record_is_whole(loop, llm):
    client = Client(loop, llm)
    end = client.wait()
    alone = llm.generate([5, 6], policy="fixed:6", max_tokens=8, ignore_eos=True)
    assert tuple(step.token_id for step in client.steps) == alone.token_ids
    assert (end.finish_reason, end.bits, end.deadline_met) == ("length", (6,) * 8, None)
    assert 0 <= end.queue_s <= end.first_token_s


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, math.inf, 6), (0, 4, 4), (8, math.inf, 8), (3, 3, 3), (5, 7, 6)]
)
def test_bounds_move_the_policys_bits(loop, llm, low, high, expected):
    assert set(Client(loop, llm, Terms(min_bits=low, max_bits=high)).wait().bits) == {expected}


def test_nothing_starts_after_its_deadline(loop, llm):
    slow = Client(loop, llm, step_s=0.02)
    assert slow.began.wait(5)
    terms = [Terms(deadline_s=0.01, on_miss=on_miss) for on_miss in ("reject", "truncate")]
    for late in [Client(loop, llm, one) for one in terms]:
        error = late.wait().error
        assert (error.status, error.code) == (429, "deadline_infeasible")
        assert not late.steps
    assert slow.wait().finish_reason == "length"


def test_what_happens_at_a_deadline_that_cannot_be_met(loop, llm):
    Client(loop, llm, step_s=0.02).wait()  # teaches about 20 ms a token
    tight = {"deadline_s": 0.08}
    assert Client(loop, llm, Terms(**tight)).wait().error.code == "deadline_infeasible"
    lower = Client(loop, llm, Terms(**tight, on_miss="lower_bits", min_bits=3)).wait()
    assert set(lower.bits) == {3}
    Client(loop, llm, step_s=0.02).wait()
    cut = Client(loop, llm, Terms(**tight, on_miss="truncate"), step_s=0.03, max_tokens=100)
    assert cut.wait().finish_reason == "length"
    assert 1 <= len(cut.steps) < 10
    assert loop.snapshot()["deadlines_due"] == 2


def test_a_full_queue_and_a_request_that_can_never_run(loop, llm):
    running = Client(loop, llm, step_s=0.02)
    assert running.began.wait(5)
    clients = [Client(loop, llm) for _ in range(2)]
    with pytest.raises(ApiError) as full:
        Client(loop, llm)
    assert (full.value.status, full.value.code) == (429, "queue_full")
    loop.cancel(clients[0].id)
    with pytest.raises(ApiError) as wrong:
        Client(loop, llm, max_tokens=10**6)
    assert wrong.value.status == 400
    assert clients[1].wait().finish_reason == "length"
    assert not clients[0].steps


def test_cancelling_ends_what_runs(loop, llm):
    client = Client(loop, llm, step_s=0.02, max_tokens=200)
    assert client.began.wait(5)
    loop.cancel(client.id)
    client.wait()
    assert len(client.steps) < 20
    loop.cancel(client.id)  # nothing
    assert Client(loop, llm).wait().finish_reason == "length"


def test_closing_refuses_what_waits_and_runs(llm):
    loop = OneLoop(llm.engine)
    running = Client(loop, llm, step_s=0.02, max_tokens=200)
    waiting = Client(loop, llm)
    assert running.began.wait(5)
    loop.close()
    assert (running.wait().error.status, waiting.wait().error.status) == (503, 503)
    with pytest.raises(ApiError):
        Client(loop, llm)


def test_a_higher_priority_goes_first_and_equals_as_they_came(llm):
    loop, order = OneLoop(llm.engine, max_waiting=8), []
    try:
        first = Client(loop, llm, step_s=0.05)
        assert first.began.wait(10)
        waiting = []
        for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5)):
            request = llm.request([5, 6], policy="fixed:6", max_tokens=2, ignore_eos=True)
            done = threading.Event()

            def take(event, name=name, done=done):
                if isinstance(event, Ended):
                    order.append(name)
                    done.set()

            loop.submit(request, Terms(priority=priority), take)
            waiting.append(done)
        assert all(done.wait(10) for done in waiting)
    finally:
        loop.close()
    assert order == ["b", "d", "a", "c"]
