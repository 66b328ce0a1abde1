"""Do greedy continuations stay those of the float model? ROUGE-L and the length of the common beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from taper.engine import Engine, Request
from taper.errors import UsageError
from taper.evaluate.perplexity import check_vocabularies, checked_widths, open_model
from taper.evaluate.sequences import common_prefix, rouge_l
from taper.evaluate.statistics import Estimate, mean_of_blocks
from taper.formats.text import read_text
from taper.models import Decoder
from taper.models.parts import FLOAT_BITS
from taper.precision import Fixed
from taper.tokenizer import Tokenizer

Int32 = NDArray[np.int32]

# A paragraph to go on from, and as much again to disagree in: 64 tokens are some 45 words.
PROMPT_TOKENS = 64
NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Of one width, over all prompts; errors are s / sqrt(prompts), None for one prompt.

    Attributes:
        bits: the width of prompt and decoding.
        rouge_l: mean ROUGE-L F1 with the float model's continuation, 0..1.
        prefix_tokens: mean number of tokens before the first that differs.
        identical_frac: share of continuations that agree in every token.
    """

    bits: float
    rouge_l: float
    rouge_l_standard_error: float | None
    prefix_tokens: float
    prefix_tokens_standard_error: float | None
    identical_frac: float


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """All widths over the same prompts.

    Attributes:
        num_prompts, prompt_tokens, new_tokens: what was asked; a continuation ends early at end-of-text.
    """

    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    results: tuple[GenerationResult, ...]


def measure_generation(
    model: str | Path,
    text: str | Path,
    against: str | Path,
    *,
    num_prompts: int,
    bits: Sequence[float] | None = None,
    progress: Callable[[str, float], None] | None = None,
    kv: str | None = None,
) -> GenerationReport:
    """Continue prompts from a text greedily with the float model and with every width, and compare.

    The prompts are evenly spaced over the text, `PROMPT_TOKENS` tokens each; `NEW_TOKENS` follow, or fewer
    where the context is short. PMPD (arXiv 2410.13461, section 5) scores its widths so.

    Args:
        model: a `.taper` file or a Hugging Face folder.
        text: .txt or .txt.xz.
        against: the float checkpoint's folder.
        num_prompts: at least 1.
        bits: widths of the file; None means all whole ones.
        progress: called as progress(what, done fraction) after each continuation.
        kv: of the model, as `open_model` takes it.

    Raises:
        UsageError: a width outside the file, no tokenizer, another vocabulary, a text shorter than a prompt.
    """
    decoder, tokenizer = open_model(model, kv)
    reference, _ = open_model(against)
    check_vocabularies(reference, decoder)
    context = min(decoder.context_length, reference.context_length)
    length, new_tokens = min(PROMPT_TOKENS, context // 2), min(NEW_TOKENS, context // 2)
    prompts = spaced_prompts(read_text(text), tokenizer, num_prompts, length)
    widths = checked_widths(decoder, bits)
    total, done = len(prompts) * (1 + len(widths)), 0

    def continued(source: Decoder, width: float) -> list[tuple[int, ...]]:
        nonlocal done
        engine = Engine(source, tokenizer)
        policy = Fixed(width)
        found = []
        for prompt in prompts:
            request = Request([int(token) for token in prompt], policy, max_tokens=new_tokens)
            found.append(engine.generate(request).token_ids)
            done += 1
            if progress is not None:
                progress(f"continuations at {width} bits", done / total)
        return found

    wanted = continued(reference, FLOAT_BITS)
    results = [compare(width, tokenizer, wanted, continued(decoder, width)) for width in widths]
    return GenerationReport(len(prompts), length, new_tokens, tuple(results))


def spaced_prompts(text: str, tokenizer: Tokenizer, num_prompts: int, length: int) -> Int32:
    """Evenly spaced pieces of a text, int32 (prompts, length), each begun as the tokenizer begins a text.

    Raises:
        UsageError: `num_prompts` below 1, or a text with fewer than `num_prompts` pieces.
    """
    begin = tokenizer.encode("")[:1]
    ids = np.array(tokenizer.encode(text, special_tokens=False), dtype=np.int32)
    taken = length - len(begin)
    if num_prompts < 1 or len(ids) < num_prompts * taken:
        raise UsageError(
            f"{num_prompts} prompts of {length} tokens are asked of a text with {len(ids)} tokens",
            hint="give a longer text, or ask for at least one prompt and fewer",
        )
    starts = np.linspace(0, len(ids) - taken, num_prompts).astype(int)
    return np.array([[*begin, *ids[start : start + taken]] for start in starts], dtype=np.int32)


def compare(
    bits: float, tokenizer: Tokenizer, wanted: Sequence[Sequence[int]], given: Sequence[Sequence[int]]
) -> GenerationResult:
    """The figures of one width from token ids, in the prompts' order."""
    pairs = list(zip(wanted, given, strict=True))
    rouge = _mean([rouge_l(tokenizer.decode(want), tokenizer.decode(have)) for want, have in pairs])
    prefix = _mean([common_prefix(want, have) for want, have in pairs])
    return GenerationResult(
        bits=bits,
        rouge_l=rouge.value,
        rouge_l_standard_error=rouge.standard_error,
        prefix_tokens=prefix.value,
        prefix_tokens_standard_error=prefix.standard_error,
        identical_frac=sum(tuple(want) == tuple(have) for want, have in pairs) / len(pairs),
    )


def _mean(values: Sequence[float]) -> Estimate:
    return mean_of_blocks(np.array(values, dtype=np.float64))
