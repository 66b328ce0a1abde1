"""Likelihoods against one pass over the whole sequence from an empty cache."""

from __future__ import annotations

import json

import numpy as np
import pytest

import taper.evaluate.likelihood as likelihood
from taper.errors import UsageError
from taper.evaluate.likelihood import Scorer, encode_pair
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.testing.tiny import tiny_taper, tiny_tokenizer_json
from taper.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tiny_tokenizer_json())


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tiny_taper(tmp_path_factory.mktemp("model") / "tiny.taper", 2, 4, max_position_embeddings=32)
    return Decoder.from_taper(TaperFile.open(path))


def scores_of(decoder: Decoder, tokens: list[int], bits: int = 3) -> tuple[list[float], list[int]]:
    """Log-probability of each token but the first, and the likeliest token there, in float64."""
    logits = decoder.forward(tokens[:-1], decoder.new_cache(len(tokens) - 1), bits, logits="all")
    assert logits is not None
    wide = logits.astype(np.float64)
    norms = np.log(np.exp(wide).sum(axis=1))
    rows = range(len(tokens) - 1)
    return [wide[i, tokens[i + 1]] - norms[i] for i in rows], [int(wide[i].argmax()) for i in rows]


def test_what_calls_share_is_not_read_twice_and_changes_nothing(decoder: Decoder) -> None:
    scorer = Scorer(decoder, TOKENIZER, 3)
    contexts = ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [5, 6, 7], [5, 6, 9, 9, 9, 9], [8])
    continuations = ([10, 11], [12], [8, 9, 10, 11], [3], [4, 5])
    for context, continuation in zip(contexts, continuations, strict=True):
        score = scorer.score_tokens(context, continuation)
        expected, _ = scores_of(decoder, [*context, *continuation])
        # Planes give the same logits however a sequence is split, so only the sums' rounding is left.
        assert score.log_likelihood == pytest.approx(sum(expected[-len(continuation) :]), rel=1e-12)
    read: list[int] = []
    forward = decoder.forward
    scorer.score_tokens([5, 6, 7, 8, 9], [10, 11])
    decoder.forward = lambda tokens, *args, **kwargs: (  # type: ignore[method-assign]
        read.append(len(tokens)),
        forward(tokens, *args, **kwargs),
    )[1]
    scorer.score_tokens([5, 6, 7, 8, 9], [20, 21])
    decoder.forward = forward  # type: ignore[method-assign]
    assert read == [2]


def test_greedy_is_what_decoding_would_give(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [5, 6, 7]
    for _ in range(4):
        _, likeliest = scores_of(decoder, [*tokens, 0])
        tokens.append(likeliest[-1])
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", 600)  # pieces of two tokens
    scorer = Scorer(decoder, TOKENIZER, 3)
    assert scorer.score_tokens(tokens[:3], tokens[3:]).is_greedy
    for place in range(3, 7):
        wrong = [*tokens[:place], (tokens[place] + 1) % 300, *tokens[place + 1 :]]
        assert not scorer.score_tokens(wrong[:3], wrong[3:]).is_greedy


def test_a_long_context_loses_its_beginning_and_says_so(decoder: Decoder) -> None:
    scorer = Scorer(decoder, TOKENIZER, 3)
    context = [2 + i % 200 for i in range(40)]
    score = scorer.score_tokens(context, [7, 8, 9])
    # 32 positions read 30 of the context and two of the continuation; the third is only predicted.
    assert score.num_dropped == 10
    expected, _ = scores_of(decoder, [*context[10:], 7, 8, 9])
    assert score.log_likelihood == pytest.approx(sum(expected[-3:]), rel=1e-12)
    assert scorer.score_tokens(context[:30], [7, 8, 9]).num_dropped == 0
    with pytest.raises(UsageError, match="33 tokens, the model's context 32"):
        scorer.score_tokens([5], [6] * 33)
    with pytest.raises(UsageError, match="at least one"):
        scorer.score_tokens([], [6])


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 64, 70])
def test_rolling_scores_every_token_once(decoder: Decoder, num_tokens: int) -> None:
    text = "".join("#$%&+"[i % 5] for i in range(num_tokens))
    ids = TOKENIZER.encode(text)
    assert len(ids) == num_tokens
    scorer = Scorer(decoder, TOKENIZER, 3)
    first = scorer.first_token
    assert first is not None
    sequence, total = [first, *ids], 0.0
    for place in range(1, len(sequence)):
        # The window that scores token `place`: whole windows count from the start, the last is filled up.
        window_end = min((place - 1) // 32 * 32 + 32, num_tokens)
        begin = max(0, window_end - 32)
        total += scores_of(decoder, sequence[begin : place + 1])[0][-1] if place > begin else 0.0
    assert scorer.rolling(text) == pytest.approx(total, rel=1e-9)
    assert scorer.rolling("") == 0.0


def test_pairs_are_cut_as_the_harness_does() -> None:
    whole = TOKENIZER.encode("in the water")
    context, continuation = encode_pair(TOKENIZER, "in the", " water", 0)
    assert context + continuation == whole
    assert TOKENIZER.decode(continuation) == " water"
    assert encode_pair(TOKENIZER, "in the ", "water", 0) == (context, continuation)
    # "t" and "he" melt into "the": the melted token is the continuation.
    assert encode_pair(TOKENIZER, "a t", "he", 0)[1] == TOKENIZER.encode("a the")[-1:]
    assert encode_pair(TOKENIZER, "", "he", 0) == ([0], TOKENIZER.encode("he"))
    with pytest.raises(UsageError, match="empty context"):
        encode_pair(TOKENIZER, "", "he", None)
    with pytest.raises(UsageError, match="empty continuation"):
        encode_pair(TOKENIZER, "he", "", 0)


def test_a_tokenizer_that_begins_texts() -> None:
    raw = json.loads(tiny_tokenizer_json())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
    with_bos = Tokenizer(json.dumps(raw))
    plain = encode_pair(TOKENIZER, "in the", " water", 0)
    assert encode_pair(with_bos, "in the", " water", 1) == ([0, *plain[0]], plain[1])
    assert encode_pair(with_bos, "", "he", 1)[0] == [0]
