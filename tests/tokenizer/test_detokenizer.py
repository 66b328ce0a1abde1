"""Pieces never hold half a character, and together they are the decoded whole."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taper.tokenizer import IncrementalDetokenizer, Tokenizer

SHARED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = st.text(
    st.one_of(st.sampled_from("Thecatsonmd. \n"), st.characters(exclude_categories=["Cs"])), max_size=40
)
FACES = "a 😀 b 👍🏽 é e\u0301 世界 👨\u200d👩\u200d👧 \u0e01\u0e33 end"


def pieces(tokenizer: Tokenizer, ids: list[int], context: tuple[int, ...] = ()) -> list[str]:
    """The text after every token, then what the flush gives."""
    detokenizer = IncrementalDetokenizer(tokenizer, context)
    return [*(detokenizer.append(token_id) for token_id in ids), detokenizer.flush()]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte, in either kind of tokenizer."""
    fallback = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in data]
    if None not in fallback:
        return fallback
    # GPT-2's map of bytes to printable characters: itself where printable, else counted up from 256
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [tokenizer.token_id(chr(b if b in printable else 256 + hidden.index(b))) for b in data]


@SHARED
@given(text=TEXTS)
def test_pieces_join_to_the_decoded_text(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert "".join(pieces(any_tokenizer, ids)) == any_tokenizer.decode(ids)


@SHARED
@given(text=TEXTS)
def test_no_piece_holds_half_a_character(any_tokenizer, text):
    ids = any_tokenizer.encode(text.replace("\ufffd", ""))
    assert not any("\ufffd" in piece for piece in pieces(any_tokenizer, ids))


@SHARED
@given(prompt=TEXTS, text=TEXTS)
def test_pieces_continue_the_prompt(any_tokenizer, prompt, text):
    """Decoding prompt and output together is the prompt's text, then the pieces."""
    context = any_tokenizer.encode(prompt)
    ids = any_tokenizer.encode(text, special_tokens=False)
    whole = any_tokenizer.decode([*context, *ids])
    assert any_tokenizer.decode(context) + "".join(pieces(any_tokenizer, ids, tuple(context))) == whole


@SHARED
@given(ids=st.lists(st.integers(0, 340), max_size=40))
def test_any_byte_level_tokens_join_to_the_decoded_text(byte_level, ids):
    """Also tokens whose bytes are no text: what is broken comes out as the same replacement characters."""
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids)


@SHARED
@given(ids=st.lists(st.one_of(st.integers(0, 2), st.integers(3 + 128, 285)), max_size=40))
def test_any_byte_fallback_tokens_keep_their_text(byte_fallback, ids):
    """Without broken bytes exactly; with broken bytes from 128 on, the text between them is the same."""
    joined, whole = "".join(pieces(byte_fallback, ids)), byte_fallback.decode(ids)
    if "\ufffd" not in whole:
        assert joined == whole
    else:
        assert "\ufffd" in joined
        assert [c for c in joined if c.isascii()] == [c for c in whole if c.isascii()]


def test_a_character_comes_out_with_its_last_byte(any_tokenizer):
    ids = byte_ids(any_tokenizer, "x😀y".encode())
    assert pieces(any_tokenizer, ids) == ["x", "", "", "", "😀", "y", ""]


def test_characters_of_a_long_byte_run_stream(any_tokenizer):
    """Not held until the run ends: text in an unknown script still streams."""
    assert pieces(any_tokenizer, byte_ids(any_tokenizer, "กขค".encode()))[2::3] == ["ก", "ข", "ค"]


def test_emoji_combining_marks_and_cjk(any_tokenizer):
    ids = byte_ids(any_tokenizer, FACES.encode())
    result = pieces(any_tokenizer, ids)
    assert "".join(result) == FACES
    assert not any("\ufffd" in piece for piece in result)


def test_a_cut_off_character_is_replaced_at_the_end(byte_level):
    ids = byte_ids(byte_level, "a世".encode()[:-1])
    assert pieces(byte_level, ids) == ["a", "", "", "\ufffd"]


def test_broken_bytes_without_end_come_out_in_time(any_tokenizer):
    """A model that babbles bytes must neither stall the stream nor cost more with every token."""
    ids = byte_ids(any_tokenizer, b"\xff" * 400)
    detokenizer = IncrementalDetokenizer(any_tokenizer)
    result = [detokenizer.append(token_id) for token_id in ids]
    assert len("".join(result)) >= 400 - 12
    assert len(detokenizer._window) <= 24
    assert "".join(result) + detokenizer.flush() == any_tokenizer.decode(ids)


def test_a_character_after_broken_bytes_is_whole(byte_level):
    ids = byte_ids(byte_level, b"\xff" * 20 + "世".encode())
    assert "".join(pieces(byte_level, ids)) == "\ufffd" * 20 + "世"


def test_whole_characters_of_a_run_that_breaks_off_stay(byte_fallback):
    ids = [
        *byte_ids(byte_fallback, "世".encode() + b"\xff"),
        *byte_fallback.encode("a", special_tokens=False),
    ]
    assert "".join(pieces(byte_fallback, ids)) == "世\ufffd a"


def test_special_tokens_in_between_are_silent(byte_fallback):
    the = byte_fallback.token_id("▁the")
    assert pieces(byte_fallback, [1, the, 2, the, 10**6, the]) == ["", "the", "", " the", "", " the", ""]


def test_special_tokens_without_end_cost_nothing(byte_fallback):
    detokenizer = IncrementalDetokenizer(byte_fallback)
    assert {detokenizer.append(2) for _ in range(100)} == {""}
    assert len(detokenizer._window) == 0


def test_bytes_after_a_prompt_that_ends_inside_a_character_come_out_at_once(byte_fallback):
    context = tuple(byte_ids(byte_fallback, "世".encode()[:2]))
    assert pieces(byte_fallback, byte_ids(byte_fallback, "世".encode()[2:] + b"x"), context) == [
        "",
        "",
        "\ufffd\ufffd",
    ]


@pytest.mark.parametrize(("context", "first"), [((), "the"), ((1,), "the"), ((1, 260), " the")])
def test_space_before_the_first_word_is_kept_after_a_prompt(byte_fallback, context, first):
    """`the` after nothing, ` the` after a prompt with a visible token, whatever special ones follow it."""
    the = byte_fallback.token_id("▁the")
    assert pieces(byte_fallback, [the], (*context, *[2] * 20))[0] == first


def test_metaspace_keeps_the_space_between_words(metaspace):
    ids = [3, 2, 0, 3, 0, 0, 1]
    assert "".join(pieces(metaspace, ids)) == metaspace.decode(ids)


def test_a_prompt_that_ends_inside_a_character_does_not_disturb(byte_level):
    context = tuple(byte_ids(byte_level, "世".encode()[:2]))
    assert pieces(byte_level, byte_level.encode("the cat"), context)[-1] == ""
    assert "".join(pieces(byte_level, byte_level.encode("the cat"), context)) == "the cat"
