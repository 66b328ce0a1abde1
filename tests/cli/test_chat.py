"""What a chat does while its user types: it reads the conversation ahead, and changes no answer by it."""

from __future__ import annotations

import contextlib
import threading

import pytest

import taper
from taper.cli.chat import Conversation
from taper.cli.run import RunOptions
from taper.testing.tiny import tiny_taper

OPTIONS = RunOptions(
    policy="phase:8/3",
    max_tokens=6,
    ctx_size=None,
    stop=(),
    show_bits=False,
    sampling={"temperature": 1.0, "seed": 3},
)


@pytest.fixture(params=[True, False], ids=["template", "text"])
def llm(request, tmp_path):
    loaded = taper.load(tiny_taper(tmp_path / "chat.taper", chat=request.param))
    with contextlib.closing(loaded):
        yield loaded


def test_answers_are_those_without_reading_ahead_from_less_work(llm, capsys):
    plain, ahead = Conversation(llm, OPTIONS), Conversation(llm, OPTIONS)
    expected = [plain.answer("the in"), plain.answer("and to")]
    first = ahead.answer("the in")
    ahead._read_ahead(ahead._expected(), threading.Event())
    second = ahead.answer("and to")
    assert [first.text, second.text] == [answer.text for answer in expected]
    assert second.token_ids == expected[1].token_ids
    # The weights are read for a few tokens either way; the KV entries of the earlier ones are not written.
    assert second.usage.num_prompt_tokens == expected[1].usage.num_prompt_tokens
    assert second.usage.prefill_tokens_per_s * second.usage.prefill_s < second.usage.num_prompt_tokens


def test_nothing_is_read_before_the_first_turn(llm):
    assert Conversation(llm, OPTIONS)._expected() is None


def test_the_users_line_ends_it(llm, capsys, monkeypatch):
    conversation = Conversation(llm, OPTIONS)
    conversation.answer("the in")
    began, calls = threading.Event(), []

    def never_done(request):
        calls.append(request)
        began.set()
        return False

    monkeypatch.setattr(llm.engine, "prepare", never_done)
    with conversation.reading_ahead():
        assert began.wait(30)
    assert calls[0].is_cancelled
    assert not [thread for thread in threading.enumerate() if thread.name == "taper-read-ahead"]
