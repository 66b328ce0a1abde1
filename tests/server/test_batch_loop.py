"""The loop of the batch engine: events, company, deadlines, the bounded queue, the end."""

from __future__ import annotations

import threading
import time

import pytest

from taper import load
from taper.engine.batch import BatchEngine, BatchSizes
from taper.engine.schedule import Terms
from taper.planner.planner import Planner
from taper.server.batch_loop import BatchLoop
from taper.server.errors import ApiError
from taper.server.serving import Ended, Refused
from taper.testing.tiny import tiny_taper


class Linear:
    def seconds(self, bits, decode_tokens, prefill_tokens, context_tokens):
        return 1e-5 * bits * (1 + decode_tokens + prefill_tokens)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tiny_taper(tmp_path_factory.mktemp("tiny") / "tiny.taper", max_position_embeddings=1024)
    return load(path, kv="7")


@pytest.fixture
def batch(llm):
    return BatchEngine(llm.engine, Planner(), Linear(), BatchSizes(max_batch=4))


@pytest.fixture
def loop(batch):
    made = BatchLoop(batch, max_waiting=8)
    yield made
    made.close()


class Client:
    def __init__(self, loop, llm, terms=None, step_s=0.0, **options):
        self.steps, self.ends, self.ended = [], [], threading.Event()
        self.step_s = step_s
        given = {"policy": "fixed:6", "max_tokens": 8, "ignore_eos": True, "temperature": 0, **options}
        self.id = loop.submit(llm.request([5, 6], **given), terms or Terms(), self._take)

    def _take(self, event):
        time.sleep(self.step_s)
        if isinstance(event, (Ended, Refused)):
            self.ends.append(event)
            self.ended.set()
        else:
            self.steps.append(event)

    def wait(self):
        assert self.ended.wait(10)
        return self.ends[-1]


def test_many_at_once_get_the_engines_answers(loop, llm):
    held = Terms(min_bits=6, max_bits=6)
    clients = [Client(loop, llm, held, seed=seed, temperature=0.9) for seed in range(8)]
    for seed, client in enumerate(clients):
        end = client.wait()
        alone = llm.generate(
            [5, 6], policy="fixed:6", max_tokens=8, ignore_eos=True, seed=seed, temperature=0.9
        )
        assert tuple(step.token_id for step in client.steps) == alone.token_ids
        assert "".join(step.text for step in client.steps) == alone.text
        assert (end.finish_reason, end.seed, end.deadline_met, end.num_prompt_tokens) == (
            "length",
            seed,
            None,
            2,
        )
        assert 0 <= end.queue_s <= end.first_token_s
        assert len(client.ends) == 1
    state = loop.snapshot()
    assert (state["num_running"], state["num_waiting"], state["kv_share"]) == (0, 0, 0)


def test_deadlines_are_kept_or_refused_at_once(loop, llm):
    assert Client(loop, llm, Terms(deadline_s=60)).wait().deadline_met is True
    refused = Client(loop, llm, Terms(deadline_s=1e-4), max_tokens=500).wait()
    assert isinstance(refused, Refused)
    assert (refused.error.status, refused.error.code) == (429, "deadline_infeasible")
    assert loop.snapshot()["deadlines_met"] == 1


def test_the_queue_is_bounded(loop, llm):
    first = [Client(loop, llm, step_s=0.05, max_tokens=40) for _ in range(4)]
    with pytest.raises(ApiError, match="8 requests are waiting") as caught:
        first.extend(Client(loop, llm, step_s=0.05, max_tokens=40) for _ in range(20))
    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    for client in first:
        loop.cancel(client.id)


def test_a_client_that_leaves_gives_its_blocks_back(loop, llm, batch):
    stays, leaves = Client(loop, llm, max_tokens=60), Client(loop, llm, step_s=0.01, max_tokens=500)
    while not leaves.steps:
        time.sleep(0.001)
    loop.cancel(leaves.id)
    stays.wait()
    for _ in range(1000):
        if not batch.has_work:
            break
        time.sleep(0.005)
    assert batch.free_kv_blocks == batch.kv_blocks
    assert not loop._jobs
    assert not loop._members
    assert len(leaves.steps) < 500


def test_closing_ends_everybody_with_503(batch, llm):
    loop = BatchLoop(batch)
    client = Client(loop, llm, step_s=0.02, max_tokens=500)
    while not client.steps:
        time.sleep(0.001)
    loop.close()
    assert client.wait().error.status == 503
    with pytest.raises(ApiError, match="stopping"):
        Client(loop, llm)


def test_a_failing_engine_answers_500_and_goes_on(loop, llm, batch, monkeypatch):
    def fail():
        raise RuntimeError("broken")

    monkeypatch.setattr(batch, "step", fail)
    assert Client(loop, llm).wait().error.status == 500
    monkeypatch.undo()
    assert isinstance(Client(loop, llm).wait(), Ended)
