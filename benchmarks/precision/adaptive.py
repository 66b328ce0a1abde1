"""Does deciding again at every token beat a static switch at equal average bits, on a task neither has seen?

    python benchmarks/precision/adaptive.py MODEL --train TEXT --task TEXT [--widths 3,2]

The rule: on the training text, for each token of the vocabulary, how much the KL divergence of the token
after it falls from the lower width to the higher. An answer takes the higher width after the tokens where
that is most, the lower one elsewhere. The threshold is the training text's median, and follows the answer so
that half of the passes are high. `settling` spends a quarter of the answer at the higher width first, then a
third of the rest by the rule. `alternate` takes the widths in turn; `flat` reads the mean of both as a
fraction of bits, where the file has a sensitivity. The static policy switches at half of the answer. Prompts
are read at all planes, and end-of-text tokens end nothing.

Loss is the mean KL divergence from all planes along the text's own continuation and along the policy's own
greedy answer, and one minus ROUGE-L of that answer with the one of all planes. Intervals are 95 %, from the
paired differences of prompts, one a document. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taper.errors import TaperError
from taper.evaluate.divergence import kl_divergences, log_normalisers
from taper.evaluate.sequences import rouge_l
from taper.evaluate.statistics import mean_of_blocks
from taper.formats.container import TaperFile
from taper.formats.text import read_text
from taper.kernels import set_num_threads
from taper.models import Decoder
from taper.tokenizer import Tokenizer
from taper.tune.greedy import new_cache, run_prompt
from taper.tune.learned_labels import random_cuts
from taper.tune.prompts import DOCUMENT_END, PromptSet, read_prompts

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ids = Sequence[int]
# Bits of the pass that draws token n, from n and the token before it; one for each answer.
Rule = Callable[[int, int], float]

Z95 = 1.96
# Sequences in one pass over the weights.
BATCH = 16
PASSAGE_TOKENS = 512
# A token that is rarely seen counts as this many of the average.
PRIOR_COUNT = 10
# How far a pass above or below the share moves the share that is asked of the next.
GAIN = 0.03


class Damage:
    """What the lower width costs after each token, and thresholds for a share of high passes."""

    def __init__(self, tokens: NDArray[np.int32], gains: F64, vocab_size: int) -> None:
        counts = np.bincount(tokens, minlength=vocab_size)
        sums = np.bincount(tokens, gains, vocab_size)
        self.by_token = (sums + PRIOR_COUNT * gains.mean()) / (counts + PRIOR_COUNT)
        self._sorted = np.sort(self.by_token[tokens])

    def threshold(self, high_frac: float) -> float:
        """The damage that this share of the training text's tokens exceeds."""
        if high_frac >= 1:
            return -np.inf
        return float(self._sorted[int((1 - max(0.0, high_frac)) * (len(self._sorted) - 1))])


def measure_damage(
    decoder: Decoder, tokenizer: Tokenizer, text: str, high: float, low: float, num_tokens: int
) -> Damage:
    """Read passages of a text at all planes and at both widths."""
    tokens: list[NDArray[np.int32]] = []
    gains: list[F64] = []
    for document in text.split(DOCUMENT_END):
        ids = np.array(tokenizer.encode(document.strip())[:PASSAGE_TOKENS], dtype=np.int32)
        if len(ids) < 2:
            continue
        rows = [_all_logits(decoder, ids, bits) for bits in (decoder.max_bits, high, low)]
        tokens.append(ids)
        gains.append(_divergences(rows[0], rows[2]) - _divergences(rows[0], rows[1]))
        if sum(map(len, tokens)) >= num_tokens:
            break
    return Damage(np.concatenate(tokens), np.concatenate(gains), decoder.config.vocab_size)


def adaptive(damage: Damage, high: float, low: float, share_at: Callable[[int], float]) -> Rule:
    """The rule with a share of high passes that may change along the answer; keeps state of one answer."""
    owed = 0.0

    def bits(n: int, token: int) -> float:
        nonlocal owed
        share = share_at(n)
        is_high = bool(damage.by_token[token] > damage.threshold(share + owed))
        owed += GAIN * (share - is_high)
        return high if is_high else low

    return bits


def rules(
    damage: Damage, high: float, low: float, max_tokens: int, fractions: bool
) -> dict[str, Callable[[], Rule]]:
    """Policy name to what makes its rule for an answer."""
    half, quarter = max_tokens // 2, max_tokens // 4
    found: dict[str, Callable[[], Rule]] = {
        "static": lambda: lambda n, token: high if n <= half else low,
        "adaptive": lambda: adaptive(damage, high, low, lambda n: 0.5),
        "settling": lambda: adaptive(damage, high, low, lambda n: 1.0 if n <= quarter else 1 / 3),
        "alternate": lambda: lambda n, token: high if n % 2 else low,
        "all high": lambda: lambda n, token: high,
        "all low": lambda: lambda n, token: low,
    }
    if fractions:
        found["flat"] = lambda: lambda n, token: (high + low) / 2
    return found


def answers(
    decoder: Decoder, prompts: PromptSet, rule: Callable[[], Rule], forced: bool
) -> tuple[list[list[int]], list[F32], float]:
    """All answers side by side: tokens, logits (tokens, vocab), and mean bits of the decode passes.

    Args:
        decoder: the model; prompts are read at all planes.
        prompts: with references of `max_tokens` tokens where `forced`.
        rule: makes the rule of an answer.
        forced: take the references' tokens instead of the likeliest.
    """
    caches = [new_cache(decoder, prompt, prompts.max_tokens) for prompt in prompts.prompts]
    rows = [
        [run_prompt(decoder, cache, prompt, decoder.max_bits)]
        for cache, prompt in zip(caches, prompts.prompts, strict=True)
    ]
    choose = [rule() for _ in caches]
    tokens: list[list[int]] = [[] for _ in caches]
    total = 0.0
    for n in range(prompts.max_tokens):
        for answer, given, logits in zip(tokens, prompts.references, rows, strict=True):
            answer.append(given[n] if forced else int(logits[n].argmax()))
        if n + 1 == prompts.max_tokens:
            break
        bits = [choose[i](n + 1, answer[-1]) for i, answer in enumerate(tokens)]
        total += sum(bits)
        for width in set(bits):
            members = [i for i, wanted in enumerate(bits) if wanted == width]
            for begin in range(0, len(members), BATCH):
                batch = members[begin : begin + BATCH]
                found = decoder.decode_batch(
                    [tokens[i][-1] for i in batch], [caches[i] for i in batch], width
                )
                for i, row in zip(batch, found, strict=True):
                    rows[i].append(row.copy())
    passes = len(caches) * max(1, prompts.max_tokens - 1)
    return tokens, [np.array(logits) for logits in rows], total / passes


def measure(
    decoder: Decoder, tokenizer: Tokenizer, prompts: PromptSet, makers: dict[str, Callable[[], Rule]]
) -> dict[str, dict[str, Any]]:
    """Policy to its losses of every prompt and its mean bits along the text and along its answers."""
    full = decoder.max_bits
    wanted, _, _ = answers(decoder, prompts, lambda: lambda n, token: full, forced=False)
    texts = [tokenizer.decode(answer) for answer in wanted]
    _, reference, _ = answers(decoder, prompts, lambda: lambda n, token: full, forced=True)
    found = {}
    for policy, maker in makers.items():
        _, rows, text_bits = answers(decoder, prompts, maker, forced=True)
        along_text = [
            _divergences(want[1:], have[1:]).mean() for want, have in zip(reference, rows, strict=True)
        ]
        given, rows, answer_bits = answers(decoder, prompts, maker, forced=False)
        along_answer = []
        for prompt, answer, logits in zip(prompts.prompts, given, rows, strict=True):
            audited = _all_logits(decoder, np.array([*prompt, *answer[:-1]], dtype=np.int32), full)
            along_answer.append(_divergences(audited[len(prompt) :], logits[1:]).mean())
        rouge = [1 - rouge_l(text, tokenizer.decode(a)) for text, a in zip(texts, given, strict=True)]
        losses = {"KL along the text": along_text, "KL along the answer": along_answer, "1 - ROUGE-L": rouge}
        found[policy] = {
            "text_bits": text_bits,
            "answer_bits": answer_bits,
            "losses": {name: np.array(values) for name, values in losses.items()},
        }
    return found


def summary(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means, and differences from static with their 95 % intervals."""
    static = found["static"]["losses"]
    rows = {}
    for policy, one in found.items():
        losses = {}
        for name, values in one["losses"].items():
            paired = mean_of_blocks(values - static[name])
            losses[name] = {
                "mean": float(values.mean()),
                "beyond_static": paired.value,
                "half_width": Z95 * (paired.standard_error or 0.0),
            }
        rows[policy] = {"text_bits": one["text_bits"], "answer_bits": one["answer_bits"], "losses": losses}
    return rows


def _all_logits(decoder: Decoder, ids: NDArray[np.int32], bits: float) -> F32:
    logits = decoder.forward(ids, decoder.new_cache(len(ids)), bits, "all")
    assert logits is not None
    return logits


def _divergences(reference: F32, logits: F32) -> F64:
    return kl_divergences(reference, log_normalisers(reference), logits, log_normalisers(logits))


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True, help="generic text")
    parser.add_argument("--task", type=Path, required=True, help="text of another kind")
    parser.add_argument("--widths", default="3,2", help="two, the larger first; fractions as 2.8,2.2")
    parser.add_argument("--train-tokens", type=int, default=60_000)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Measure the damage, compare, print."""
    options = arguments(given)
    set_num_threads(options.threads)
    try:
        file = TaperFile.open(options.model)
        decoder, tokenizer = Decoder.from_taper(file), Tokenizer(file.tokenizer_json or "")
        high, low = (float(word) for word in options.widths.split(","))
        text = read_text(options.train)
        damage = measure_damage(decoder, tokenizer, text, high, low, options.train_tokens)
        drawn = read_prompts(
            options.task,
            tokenizer,
            name=options.task.name,
            num_prompts=options.prompts,
            prompt_tokens=options.prompt_tokens,
            max_tokens=options.max_tokens,
            seed=options.seed,
        )
        makers = rules(damage, high, low, options.max_tokens, decoder.has_sensitivity)
        rows = summary(measure(decoder, tokenizer, random_cuts(drawn, options.seed), makers))
    except TaperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.model.name}, {options.task.name}, {options.prompts} prompts, widths {options.widths}")
    for policy, row in rows.items():
        figures = ", ".join(
            f"{name} {loss['mean']:.4f} ({loss['beyond_static']:+.4f} ± {loss['half_width']:.4f})"
            for name, loss in row["losses"].items()
        )
        print(f"  {policy}: {row['text_bits']:.3f} and {row['answer_bits']:.3f} bits; {figures}")
    print(
        json.dumps(
            {"model": options.model.name, "task": options.task.name, "widths": [high, low], "rows": rows}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
