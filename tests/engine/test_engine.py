"""The engine's loop over a scripted decoder: passes, ends, figures, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers

from taper.engine import Engine, Request, SamplingParams
from taper.engine.completion import StepOutput
from taper.errors import DoesNotFitError, UsageError
from taper.precision import Fixed, PhaseAware
from taper.tokenizer import Tokenizer

EOS = 257
FOUR = Fixed(4)


def texts(steps: list[StepOutput]) -> list[str]:
    return [step.text for step in steps]


# --- passes ---


def test_prompt_is_prefilled_in_chunks_and_only_the_last_gives_logits(says, tokenizer):
    model = says("xy")
    Engine(model, tokenizer, prefill_chunk_tokens=4).generate(Request("abcdefghij", FOUR, max_tokens=2))
    assert model.passes == [
        (tuple(b"abcd"), 4, "none"),
        (tuple(b"efgh"), 4, "none"),
        (tuple(b"ij"), 4, "last"),
        (tuple(b"x"), 4, "last"),
    ]


@pytest.mark.parametrize("chunk", [1, 3, 6, 7, 256])
def test_chunk_size_changes_nothing_in_the_result(says, tokenizer, chunk):
    result = Engine(says("hello"), tokenizer, chunk).generate(Request("prompt", FOUR, max_tokens=5))
    assert (result.text, result.usage.num_prompt_tokens) == ("hello", 6)


def test_cache_holds_prompt_and_output(says, tokenizer):
    model = says("abc")
    Engine(model, tokenizer).generate(Request("12345", FOUR, max_tokens=3))
    assert model.capacities == [8]


# --- ends ---


def test_length_ends_at_max_tokens_and_takes_no_further_pass(says, tokenizer):
    model = says("abc")
    steps = list(Engine(model, tokenizer).stream(Request("p", FOUR, max_tokens=3)))
    assert texts(steps) == ["a", "b", "c"]
    assert [step.finish_reason for step in steps] == [None, None, "length"]
    assert len(model.passes) == 3


def test_eos_ends_without_text(says, tokenizer):
    result = Engine(says([97, EOS, 98]), tokenizer).generate(Request("p", FOUR))
    assert (result.text, result.token_ids, result.bits) == ("a", (97, EOS), (4, 4))
    assert (result.finish_reason, result.stop_reason) == ("stop", EOS)


def test_eos_passes_when_ignored_but_stop_tokens_do_not(says, tokenizer):
    request = Request("p", FOUR, ignore_eos=True, stop_token_ids=(98,))
    result = Engine(says([97, EOS, 99, 98]), tokenizer).generate(request)
    assert (result.text, result.stop_reason) == ("ac", 98)


def test_eos_on_the_last_token_is_a_stop(says, tokenizer):
    assert (
        Engine(says([97, EOS]), tokenizer).generate(Request("p", FOUR, max_tokens=2)).finish_reason == "stop"
    )


def test_stop_string_ends_before_it_and_is_not_shown(says, tokenizer):
    stream = Engine(says("one\nUser: two"), tokenizer).stream(Request("p", FOUR, stop=("\nUser:",)))
    steps = list(stream)
    assert texts(steps) == ["o", "n", "e", "", "", "", "", "", ""]
    result = stream.completion()
    assert (result.text, result.finish_reason, result.stop_reason) == ("one", "stop", "\nUser:")
    assert bytes(result.token_ids) == b"one\nUser:"


def test_one_stop_string_may_be_given_bare(says, tokenizer):
    assert Engine(says("abcd"), tokenizer).generate(Request("p", FOUR, stop="bc")).text == "a"


def test_held_back_text_comes_out_at_the_end(says, tokenizer):
    for output, limit in (("ab\nUs", 5), ([*b"ab\nUs", EOS], 9)):
        steps = list(
            Engine(says(output), tokenizer).stream(Request("p", FOUR, stop="\nUser:", max_tokens=limit))
        )
        assert "".join(texts(steps)) == "ab\nUs"
        assert steps[-1].text == "\nUs"


def test_a_character_of_several_tokens_is_shown_whole(says, tokenizer):
    steps = list(Engine(says("a😀b"), tokenizer).stream(Request("p", FOUR, max_tokens=6)))
    assert texts(steps) == ["a", "", "", "", "😀", "b"]
    assert "".join(map(str, steps)) == "a😀b"


def test_a_cut_off_character_is_marked_at_the_end(says, tokenizer):
    result = Engine(says("a世"), tokenizer).generate(Request("p", FOUR, max_tokens=3))
    assert result.text == "a\ufffd"


def test_the_space_after_the_prompt_is_kept(says):
    """SentencePiece decoding strips the first space of a text; an output that continues a prompt keeps it."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁one": 0, "▁two": 1}, "▁one"))
    words.decoder = tokenizers.decoders.Metaspace()
    model = says([1, 1], vocab_size=2, eos=())
    result = Engine(model, Tokenizer(words.to_str())).generate(Request([0], FOUR, max_tokens=2))
    assert result.text == " two two"


def test_stop_string_that_the_end_completes_counts(says, tokenizer):
    """A broken character becomes U+FFFD only when the output ends; a stop string may contain it."""
    result = Engine(says("ab世"), tokenizer).generate(Request("p", FOUR, max_tokens=4, stop="b\ufffd"))
    assert (result.text, result.finish_reason, result.stop_reason) == ("a", "stop", "b\ufffd")


# --- cancellation ---


def test_cancel_between_tokens(says, tokenizer):
    model = says("abcdef")
    stream = Engine(model, tokenizer).stream(Request("p", FOUR))
    assert [next(stream).text, next(stream).text] == ["a", "b"]
    stream.cancel()
    assert list(stream) == []
    assert (stream.completion().text, stream.completion().finish_reason) == ("ab", "abort")
    assert len(model.passes) == 2


def test_cancel_between_prefill_chunks(says, tokenizer):
    request = Request("abcdefgh", FOUR)
    model = says("x", on_pass=lambda model: request.cancel() if len(model.passes) == 2 else None)
    stream = Engine(model, tokenizer, prefill_chunk_tokens=2).stream(request)
    assert list(stream) == []
    completion = stream.completion()
    assert (completion.finish_reason, completion.token_ids, len(model.passes)) == ("abort", (), 2)
    assert completion.usage.prefill_tokens_per_s == 4 / completion.usage.prefill_s


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_aborts_and_frees_the_cache(says, tokenizer, taken):
    model = says("abcdef")
    with Engine(model, tokenizer).stream(Request("p", FOUR)) as stream:
        for _ in range(taken):
            next(stream)
    assert stream.completion().finish_reason == "abort"
    assert len(model.caches) == min(taken, 1)
    assert all(cache() is None for cache in model.caches)


def test_the_cache_is_freed_at_the_end(says, tokenizer):
    model = says("ab")
    stream = Engine(model, tokenizer).stream(Request("p", FOUR, max_tokens=2))
    next(stream)
    assert model.caches[0]() is not None
    list(stream)
    assert model.caches[0]() is None


def test_an_interrupt_in_a_pass_aborts_and_passes_on(says, tokenizer):
    def interrupt(model):
        if len(model.passes) == 3:
            raise KeyboardInterrupt

    stream = Engine(says("abcdef", on_pass=interrupt), tokenizer).stream(Request("p", FOUR))
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert (stream.completion().text, stream.completion().finish_reason) == ("ab", "abort")


def test_an_error_that_is_kept_does_not_keep_the_cache(says, tokenizer):
    """Its traceback holds the engine's frames; the cache must be gone from them."""

    class Failing:
        name = "failing"

        def bits(self, step):
            return 4 if step.phase == "prefill" else 9

    model = says("a")
    with pytest.raises(UsageError) as error:
        Engine(model, tokenizer).generate(Request("p", Failing()))
    assert error.tb is not None
    assert model.caches[0]() is None


def test_streams_side_by_side_do_not_disturb_each_other(says, tokenizer):
    engine = Engine(says(), tokenizer)
    params = SamplingParams(temperature=5.0, seed=3)
    alone = engine.generate(Request("p", FOUR, params, max_tokens=8)).token_ids
    one, two = (engine.stream(Request("p", FOUR, params, max_tokens=8)) for _ in range(2))
    pairs = list(zip(one, two, strict=True))
    assert tuple(a.token_id for a, _ in pairs) == tuple(b.token_id for _, b in pairs) == alone


# --- context length and prompts ---


def test_max_tokens_none_is_what_the_context_leaves(says, tokenizer):
    result = Engine(says(), tokenizer).generate(Request("a" * 60, FOUR))
    assert (len(result.token_ids), result.finish_reason) == (4, "length")


def test_prompt_and_output_may_fill_the_context_exactly(says, tokenizer):
    assert len(Engine(says(), tokenizer).generate(Request("a" * 60, FOUR, max_tokens=4)).token_ids) == 4


def test_more_than_the_context_is_refused_with_the_numbers(says, tokenizer):
    with pytest.raises(DoesNotFitError, match="60 prompt and 5 new tokens exceed the context of 64") as error:
        Engine(says(), tokenizer).stream(Request("a" * 60, FOUR, max_tokens=5))
    assert "at most 4 new tokens" in error.value.hint


@pytest.mark.parametrize("length", [64, 65])
def test_prompt_that_leaves_no_room_is_refused(says, tokenizer, length):
    with pytest.raises(DoesNotFitError, match=f"prompt has {length} tokens; the context of 64"):
        Engine(says(), tokenizer).stream(Request("a" * length, FOUR))


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_empty_prompt_is_refused_unless_allowed(says, tokenizer, prompt):
    with pytest.raises(UsageError, match="prompt is empty"):
        Engine(says(), tokenizer).stream(Request(prompt, FOUR))
    model = says("a")
    Engine(model, tokenizer).generate(Request(prompt, FOUR, max_tokens=1, allow_empty_prompt=True))
    assert model.passes[0][0] == (256,)


@pytest.mark.parametrize("bad", [-1, 258, 10**12, 1.5, "a"])
def test_token_ids_outside_the_vocabulary_are_refused(says, tokenizer, bad):
    engine = Engine(says(), tokenizer)
    with pytest.raises(UsageError, match=r"the prompt has the token id .* 0 to 257"):
        engine.stream(Request([1, bad], FOUR))
    with pytest.raises(UsageError, match="stop_token_ids"):
        engine.stream(Request("a", FOUR, stop_token_ids=[bad]))


def test_numpy_token_ids_are_fine(says, tokenizer):
    assert Engine(says("a"), tokenizer).generate(
        Request(np.array([1, 2]), FOUR, max_tokens=1)
    ).prompt_ids == (1, 2)


@pytest.mark.parametrize("prompt", [b"bytes", None, 7])
def test_prompt_of_another_kind_is_refused(says, tokenizer, prompt):
    with pytest.raises(UsageError, match="must be text or token ids"):
        Engine(says(), tokenizer).stream(Request(prompt, FOUR))


@pytest.mark.parametrize("max_tokens", [0, -1, 1.0, "5", True])
def test_max_tokens_below_one_is_refused(max_tokens):
    with pytest.raises(UsageError, match="max_tokens is"):
        Request("p", FOUR, max_tokens=max_tokens)


def test_chunk_below_one_is_refused(says, tokenizer):
    with pytest.raises(UsageError, match="prefill_chunk_tokens is 0"):
        Engine(says(), tokenizer, 0)


def test_without_a_tokenizer_token_ids_work_and_text_is_refused(says):
    engine = Engine(says("ab"), None)
    result = engine.generate(Request([1], FOUR, max_tokens=2))
    assert (result.text, result.token_ids) == ("", (97, 98))
    with pytest.raises(UsageError, match="no tokenizer"):
        engine.stream(Request("text", FOUR))
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        engine.stream(Request([1], FOUR, stop="a"))


def test_checks_come_before_the_first_token_is_asked_for(says, tokenizer):
    model = says()
    with pytest.raises(UsageError, match="vocabulary"):
        Engine(model, tokenizer).stream(Request("p", FOUR, SamplingParams(logit_bias={999: 1})))
    assert model.caches == []


# --- the record ---


def test_usage_counts_passes_bits_and_bytes(says, tokenizer):
    request = Request("12345", PhaseAware(8, 3), max_tokens=3)
    usage = Engine(says("abc"), tokenizer, prefill_chunk_tokens=4).generate(request).usage
    assert (usage.num_prompt_tokens, usage.num_completion_tokens) == (5, 3)
    assert usage.average_bits == 3
    assert usage.prefill_bytes == (8000 + 4 * 10) + (8000 + 5 * 10)
    assert usage.decode_bytes == (3000 + 6 * 10) + (3000 + 7 * 10)
    assert usage.bytes_per_token == usage.decode_bytes / 2
    assert usage.prefill_tokens_per_s == 5 / usage.prefill_s
    assert usage.decode_tokens_per_s == 2 / usage.decode_s
    assert usage.peak_memory_bytes > 10 << 20


def test_usage_of_one_token_has_no_decode_pass(says, tokenizer):
    usage = Engine(says("a"), tokenizer).generate(Request("p", FOUR, max_tokens=1)).usage
    assert (usage.decode_s, usage.decode_tokens_per_s, usage.bytes_per_token, usage.average_bits) == (
        0,
        0,
        0,
        4,
    )


def test_the_seed_that_was_used_replays_the_run(says, tokenizer):
    params = SamplingParams(temperature=3.0)
    engine = Engine(says(), tokenizer)
    first = engine.generate(Request("p", FOUR, params, max_tokens=10))
    again = engine.generate(
        Request("p", FOUR, SamplingParams(temperature=3.0, seed=first.seed), max_tokens=10)
    )
    other = engine.generate(Request("p", FOUR, params, max_tokens=10))
    assert first.token_ids == again.token_ids != other.token_ids


def test_logprobs_are_in_steps_and_completion(says, tokenizer):
    params = SamplingParams(logprobs=True, top_logprobs=2)
    stream = Engine(says("ab"), tokenizer).stream(Request("p", FOUR, params, max_tokens=2))
    steps = list(stream)
    best = pytest.approx(9 - np.log(np.exp(9) + 257))
    assert [(s.logprob, s.top_logprobs[0]) for s in steps] == [(best, (97, best)), (best, (98, best))]
    completion = stream.completion()
    assert completion.logprobs == tuple(s.logprob for s in steps)
    assert completion.top_logprobs == tuple(s.top_logprobs for s in steps)


def test_completion_of_a_running_stream_has_no_finish_reason(says, tokenizer):
    stream = Engine(says("abc"), tokenizer).stream(Request("p", FOUR, max_tokens=3))
    next(stream)
    assert (stream.completion().text, stream.completion().finish_reason) == ("a", None)


def test_repetition_penalty_sees_the_prompt(says, tokenizer):
    """The script favours 'a' by 9; halved it still wins, divided by 1e9 it ties with nothing above zero."""
    params = SamplingParams(repetition_penalty=1e9, logit_bias={98: 1.0})
    engine = Engine(says("aa"), tokenizer)
    assert engine.generate(Request("a", FOUR, params, max_tokens=1)).text == "b"
    assert Engine(says("aa"), tokenizer).generate(Request("p", FOUR, params, max_tokens=2)).text == "ab"
