"""Writing the KV cache again with the bits that the prompt should have had."""

from __future__ import annotations

import time

from taper.engine.limits import Limits
from taper.engine.model_runner import ModelRunner
from taper.engine.sequence import Sequence


def is_due(sequence: Sequence, limits: Limits) -> bool:
    """Whether a request that asked for it can now have the bits that its prompt missed. True once at most:
    each refresh costs a prefill."""
    missed = sequence.missed_bits
    return sequence.request.refresh and missed > 0 and limits.bits() >= missed and not sequence.refreshes


def refresh(sequence: Sequence, runner: ModelRunner, chunk_tokens: int) -> None:
    """Read prompt and answer again, but for the last token, whose pass comes next; counts as decoding."""
    began_ns = time.perf_counter_ns()
    bits = sequence.missed_bits
    ids = sequence.prompt_ids + [token.token_id for token in sequence.tokens[:-1]]
    runner.truncate(0)
    for start in range(0, len(ids), chunk_tokens):
        runner.prefill(ids[start : start + chunk_tokens], bits, is_last=False)
        sequence.decode_bytes += runner.bytes_of_last_pass(bits)
    sequence.prompt_bits = [bits]
    sequence.refreshes.append((len(sequence.tokens), bits))
    sequence.decode_ns += time.perf_counter_ns() - began_ns
