"""The audit against both widths run token by token, its figures by hand, its ends and limits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import tokenizers

import taper
from taper.engine import LLM, Audit, Completion, Engine, Request
from taper.engine import audit as audit_module
from taper.engine.audit import AuditLog, ForcedTokens, compare, run_audit
from taper.engine.limits import Limits
from taper.engine.model_runner import ModelRunner
from taper.errors import DoesNotFitError, UsageError
from taper.precision import Fixed
from taper.testing.tiny import tiny_taper
from taper.tokenizer import Tokenizer

PROMPT = "the other one in the"


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Iterator[LLM]:
    loaded = taper.load(tiny_taper(tmp_path_factory.mktemp("audit") / "tiny.taper"))
    yield loaded
    loaded.close()


def answer(llm: LLM, policy: str, **options: object) -> Completion:
    options = {"max_tokens": 24, "ignore_eos": True, "temperature": 1.0, "seed": 3, "audit": True, **options}
    return llm.generate(PROMPT, policy=policy, **options)


def token_by_token(llm: LLM, ids: list[int], bits: list[float]) -> np.ndarray:
    """Log-probabilities after each token, float64 (tokens, vocab), each token read at bits of its own."""
    model = llm.engine.model
    cache = model.new_cache(len(ids))
    rows = [
        model.forward(np.array([token], np.int32), cache, width, "last")[0].astype(np.float64)
        for token, width in zip(ids, bits, strict=True)
    ]
    return np.array([row - math.log(math.fsum(np.exp(row))) for row in rows])


@pytest.mark.parametrize("policy", ["phase:8/3", "phase:3/8", "progressive:6@0,2@5", "fixed:2"])
def test_figures_are_those_of_both_widths_run_token_by_token(llm, policy):
    completion = answer(llm, policy)
    prompt, drawn = list(completion.prompt_ids), list(completion.token_ids)
    ids, first = prompt + drawn[:-1], len(prompt) - 1
    used_bits = [completion.bits[0]] * len(prompt) + list(completion.bits[1:])
    log_p = token_by_token(llm, ids, [8] * len(ids))[first:]
    log_q = token_by_token(llm, ids, used_bits)[first:]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    audit = completion.audit
    assert kl.mean() > 0.01
    np.testing.assert_allclose(audit.kl, kl, rtol=1e-9, atol=1e-15)
    assert audit.agreement == tuple(log_p.argmax(axis=1) == log_q.argmax(axis=1))
    at = np.arange(len(drawn)), drawn
    np.testing.assert_allclose(audit.logprobs, log_q[at], rtol=1e-12)
    np.testing.assert_allclose(audit.reference_logprobs, log_p[at], rtol=1e-12)
    np.testing.assert_allclose(audit.certainty, np.exp(log_p.max(axis=1)), rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_full_width_has_exactly_no_loss(llm, chunk, monkeypatch):
    """Decoding and one prefill give the same bytes, however they are cut."""
    monkeypatch.setattr(llm.engine, "_prefill_chunk_tokens", chunk)
    audit = answer(llm, "fixed:8").audit
    assert audit.kl == (0.0,) * 24
    assert audit.logprobs == audit.reference_logprobs
    assert (audit.top1_share, audit.mean_kl_bound, audit.decisions.changed) == (1.0, 0.0, ())


def test_loss_is_against_the_width_that_was_asked_for(llm):
    assert answer(llm, "fixed:3", audit_bits=3).audit.worst_kl == 0
    assert answer(llm, "fixed:3", audit_bits=4.0).audit.bits == 4
    assert answer(llm, "fixed:3", audit_bits=4).audit.worst_kl > 0


def test_answer_is_that_of_a_run_without_audit(llm):
    audited, plain = answer(llm, "fixed:2"), answer(llm, "fixed:2", audit=False)
    assert (audited.token_ids, audited.usage.decode_bytes) == (plain.token_ids, plain.usage.decode_bytes)
    assert plain.audit is None


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_reused_prompt_changes_the_cost_and_no_figure(llm, chunk, monkeypatch):
    monkeypatch.setattr(audit_module, "PASS_LOGITS", 4 * 300)
    completion = answer(llm, "phase:8/3", audit=False)
    prompt, drawn = list(completion.prompt_ids), list(completion.token_ids)
    runner = ModelRunner(llm.engine.model, len(prompt) + len(drawn))
    used = [runner.prefill(prompt, 8, is_last=True)]
    used += [runner.decode(token, 3) for token in drawn[:-1]]
    reused = run_audit(used, 8, runner, prompt, drawn, True, chunk, lambda: False)
    whole = run_audit(used, 8, runner, prompt, drawn, False, chunk, lambda: False)
    assert (reused.kl, reused.certainty) == (whole.kl, whole.certainty)
    assert reused.kl[0] == 0 < reused.kl[1]
    assert (reused.num_pass_tokens, whole.num_pass_tokens) == (24, len(prompt) + 23)
    assert reused.num_bytes < whole.num_bytes


@pytest.mark.parametrize(("policy", "extra"), [("phase:8/3", 0), ("phase:3/8", -1)])
def test_prompt_is_reused_only_where_it_was_read_at_the_full_width(llm, policy, extra):
    completion = answer(llm, policy)
    rerun = -extra * (len(completion.prompt_ids) - 1)
    assert completion.audit.num_pass_tokens == 24 + rerun


class EightThenThree:
    """8 bits for what the first pass reads, 3 for the rest."""

    name = "eight-then-three"

    def bits(self, step):
        return 3 if step.position else 8


def test_prompt_that_was_read_ahead_is_known_by_its_bits(llm):
    """The prepared entries are at 8 bits, the only pass over the prompt is at 3."""
    engine = Engine(llm.engine.model, llm.tokenizer)
    engine.prepare(llm.request(PROMPT, policy=EightThenThree()))
    found = engine.generate(
        llm.request(PROMPT, policy=EightThenThree(), audit=True, audit_bits=3, max_tokens=5, ignore_eos=True)
    )
    assert found.bits == (3,) * 5
    assert found.audit.num_pass_tokens == len(found.prompt_ids) + 4
    assert found.audit.kl[0] > 0


def test_audit_takes_what_has_arrived_and_says_so(llm):
    engine = Engine(llm.engine.model, llm.tokenizer, limits=Limits(lambda: 4))
    request = llm.request(PROMPT, policy="fixed:3", audit=True, max_tokens=5, ignore_eos=True)
    assert engine.generate(request).audit.bits == 4
    with pytest.raises(DoesNotFitError, match="against 6 bits; 4 are in memory"):
        engine.generate(llm.request(PROMPT, policy="fixed:3", audit=True, audit_bits=6, max_tokens=5))


def test_prompt_that_was_read_again_is_known_by_its_new_bits(llm):
    """Three planes for the prompt, all of them before the second token, whose refresh rewrites the prompt."""
    arrived = iter([3])
    engine = Engine(llm.engine.model, llm.tokenizer, limits=Limits(lambda: next(arrived, 8)))
    options = {"policy": "fixed:8", "audit": True, "max_tokens": 5, "ignore_eos": True, "refresh": True}
    for audit_bits, tokens in ((8, 5), (3, len(llm.tokenizer.encode(PROMPT)) + 4)):
        arrived = iter([3])
        completion = engine.generate(llm.request(PROMPT, audit_bits=audit_bits, **options))
        assert completion.refreshes
        assert completion.audit.num_pass_tokens == tokens
        assert (completion.audit.kl[0] == 0) is (audit_bits == 3)
        assert (completion.audit.kl[1] == 0) is (audit_bits == 8)


def test_cost_is_the_bytes_of_its_passes(llm):
    audit, model = answer(llm, "phase:8/3").audit, llm.engine.model
    entries = len(answer(llm, "phase:8/3").prompt_ids) + 23
    assert audit.num_bytes == model.bytes_per_pass(8) + model.new_cache(1).bytes_read(entries)
    assert audit.seconds > 0


def test_kl_of_a_token_by_hand():
    reference, used = (np.log(np.array(p, np.float32)) + 7 for p in ((0.9, 0.1), (0.5, 0.5)))
    found = compare(reference, used, 1)
    assert found.kl == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-6)
    assert (found.logprob, found.reference_logprob, found.certainty) == pytest.approx(
        (math.log(0.5), math.log(0.1), 0.9), rel=1e-6
    )
    assert found.agrees  # a tie goes to the lowest id
    assert not compare(reference, used[::-1] + np.array([0, 1], np.float32), 0).agrees


def audit_of(kl: list[float], agreement: list[bool], certainty: list[float]) -> Audit:
    zeros = (0.0,) * len(kl)
    return Audit(8, tuple(kl), tuple(agreement), zeros, zeros, tuple(certainty), 0.1, 5, len(kl))


def test_summary_by_hand():
    audit = audit_of([0.1, 0.5, 0.0, 0.5], [True, False, True, False], [0.9, 0.95, 0.2, 0.89])
    assert audit.mean_kl == pytest.approx(0.275)
    assert (audit.worst_kl, audit.worst_index, audit.top1_share) == (0.5, 1, 0.5)
    assert (audit.decisions.num_sure, audit.decisions.changed) == (2, (1,))
    assert audit.mean_kl_bound is None  # four tokens say nothing about their spread


def test_bound_takes_neighbours_for_one():
    """Batches of five with means 1.8, 4.2, 6.8, 9.2: s = 3.2021, so 5.5 + 2.3534 * 3.2021 / sqrt(4)."""
    kl = [float(1 + index // 2) for index in range(20)]
    assert audit_of(kl, [True] * 20, [0.0] * 20).mean_kl_bound == pytest.approx(9.2679, abs=1e-4)
    mixed = kl[::2] + kl[1::2]  # 1..10 twice: batches of means 3, 8, 3, 8, s = 2.8868
    assert audit_of(mixed, [True] * 20, [0.0] * 20).mean_kl_bound == pytest.approx(8.8969, abs=1e-4)
    assert audit_of(kl[:19], [True] * 19, [0.0] * 19).mean_kl_bound is None


def test_given_answer_is_audited_as_a_drawn_one(llm):
    drawn = answer(llm, "phase:8/3")
    given = llm.audit(PROMPT, drawn.token_ids, policy="phase:8/3")
    assert (given.audit.kl, given.token_ids, given.bits) == (drawn.audit.kl, drawn.token_ids, drawn.bits)
    assert llm.audit(PROMPT, drawn.token_ids, policy="fixed:8").audit.worst_kl == 0


def test_exact_mode_has_no_loss_whether_drawn_or_given(llm):
    drawn = answer(llm, "exact:8/2")
    assert drawn.audit.kl == (0.0,) * 24
    given = llm.audit(PROMPT, drawn.token_ids, policy="exact:8/2")
    assert (given.audit.worst_kl, given.token_ids) == (0.0, drawn.token_ids)


def test_given_text_is_cut_as_the_continuation_of_the_prompt(llm):
    given = llm.audit("the in", " the one", policy="fixed:3", max_tokens=1, stop=(" the",))
    assert given.prompt_ids + given.token_ids == tuple(llm.tokenizer.encode("the in the one"))
    assert (given.text, len(given.audit.kl)) == (" the one", len(given.token_ids))
    ids = llm.tokenizer.encode("the in")
    assert llm.audit(ids, " the one", policy="fixed:3").token_ids == given.token_ids
    eos = llm.tokenizer.token_id("<|eos|>")
    assert len(llm.audit("the in", [eos, 5], policy="fixed:3", stop_token_ids=(eos,)).audit.kl) == 2


def test_prompt_and_given_text_are_encoded_as_one(llm):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁one": 0, "▁two": 1}, "▁one"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    engine = Engine(llm.engine.model, Tokenizer(words.to_str()))
    assert engine.audit(Request("on", Fixed(3)), "e two").token_ids == (1,)


@pytest.mark.parametrize(("given", "message"), [("", "empty"), ([], "empty"), ([300], "0 to 299")])
def test_given_answer_is_checked(llm, given, message):
    with pytest.raises(UsageError, match=message):
        llm.audit("the in", given)


@pytest.mark.parametrize("bits", [1, 9, math.nan, "4", True, 3.5])
def test_width_outside_the_model_is_refused(llm, bits):
    with pytest.raises(UsageError):
        llm.stream(PROMPT, audit=True, audit_bits=bits)
    with pytest.raises(UsageError, match="audit is False"):
        llm.stream(PROMPT, audit_bits=4)


def test_more_logits_than_it_may_keep_are_refused_before_the_first_pass(llm, monkeypatch):
    monkeypatch.setattr(audit_module, "MAX_KEPT_BYTES", 24 * 300 * 4)
    assert len(answer(llm, "fixed:3").audit.kl) == 24
    with pytest.raises(DoesNotFitError, match="audit of 25 tokens") as refused:
        llm.stream(PROMPT, audit=True, max_tokens=25)
    assert "at most 24 new tokens" in refused.value.hint


def test_kept_logits_are_copies_of_their_row():
    log, rows = AuditLog(8), np.ones((4, 5), np.float32)
    log.keep(rows[2])
    assert log.logits[0].base is None


def test_cancelled_answer_has_no_audit(llm):
    request = llm.request(PROMPT, policy="fixed:3", audit=True, max_tokens=9, ignore_eos=True)
    stream = llm.engine.stream(request)
    next(stream)
    stream.cancel()
    assert list(stream) == []
    assert (stream.completion().audit, stream.completion().finish_reason) == (None, "abort")
    assert stream._sequence.audit_log is None  # and what it kept is freed


def test_request_that_is_cancelled_before_its_first_token_has_no_audit(llm):
    request = llm.request(PROMPT, policy="fixed:3", audit=True)
    request.cancel()
    assert (llm.engine.generate(request).audit, request.is_cancelled) == (None, True)


def test_audit_can_be_cancelled_between_its_passes(llm, monkeypatch):
    monkeypatch.setattr(audit_module, "PASS_LOGITS", 300)
    request = llm.request(PROMPT, policy="phase:8/3", audit=True, max_tokens=9, ignore_eos=True)
    passes = []
    verify = ModelRunner.verify

    def counted(self, *arguments):
        passes.append(arguments)
        request.cancel()
        return verify(self, *arguments)

    monkeypatch.setattr(ModelRunner, "verify", counted)
    completion = llm.engine.generate(request)
    assert len(passes) == 1
    assert (completion.audit, completion.finish_reason) == (None, "length")


def test_closed_stream_has_no_audit(llm):
    with llm.stream(PROMPT, audit=True, max_tokens=1) as stream:
        assert next(stream).finish_reason is not None
    assert stream.completion().audit is None


def test_forced_tokens_come_in_order():
    forced = ForcedTokens([4, 2])
    ahead = forced.fork()
    assert [ahead.draw(np.zeros(5, np.float32)) for _ in range(2)] == [4, 2]
    assert [forced.sample(np.zeros(5, np.float32)).token_id for _ in range(2)] == [4, 2]
