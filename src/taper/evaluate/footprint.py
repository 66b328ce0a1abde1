"""Memory that a reading takes: weights, KV cache, and a surplus measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from taper.engine import load
from taper.engine.engine import PREFILL_CHUNK_TOKENS
from taper.errors import TaperError
from taper.models import Decoder

_NEW_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one process that reads a prompt and decodes.

    Attributes:
        weight_bytes: planes and scales that a pass reads (`Decoder.bytes_per_pass`).
        kv_bytes: keys and values of the context.
        surplus_bytes: everything else: the interpreter, the tokenizer, activations of a prefill chunk.
    """

    weight_bytes: int
    kv_bytes: int
    surplus_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.surplus_bytes


def footprint(decoder: Decoder, bits: float, context_tokens: int, surplus_bytes: int) -> Footprint:
    """What a reading takes with a context of so many tokens.

    Args:
        decoder: over a file's planes.
        bits: the reading.
        context_tokens: prompt and answer together.
        surplus_bytes: of `measure_surplus`.

    Raises:
        DoesNotFitError: the context is longer than the model's.
        UsageError: bits that the file cannot be read at.
    """
    kv_bytes = decoder.new_cache(context_tokens).bytes_at(context_tokens)
    return Footprint(decoder.bytes_per_pass(bits), kv_bytes, surplus_bytes)


def measure_surplus(path: str | Path, decoder: Decoder) -> int:
    """Bytes that a fresh process takes at the least width beyond weights and KV cache.

    It reads one prefill chunk and decodes two tokens; 0 where the system does not tell its peak memory.

    Raises:
        TaperError: the process failed.
    """
    bits = decoder.min_bits
    command = [sys.executable, "-m", "taper.evaluate.footprint", str(path), str(bits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TaperError(f"the process that measures memory failed: {reason}")
    measured: tuple[int | None, int] = tuple(json.loads(done.stdout))
    peak_bytes, num_tokens = measured
    if peak_bytes is None:
        return 0
    return max(0, peak_bytes - footprint(decoder, bits, num_tokens, 0).peak_bytes)


def main() -> None:
    """Read a chunk, decode, print the peak memory of this process and the tokens in its cache."""
    path, bits = sys.argv[1:]
    llm = load(path)
    context = llm.engine.model.context_length
    prompt = [
        index % llm.config.vocab_size for index in range(min(PREFILL_CHUNK_TOKENS, context - _NEW_TOKENS))
    ]
    done = llm.generate(prompt, policy=f"fixed:{bits}", max_tokens=_NEW_TOKENS, ignore_eos=True)
    print(json.dumps([done.usage.peak_memory_bytes, len(prompt) + _NEW_TOKENS]))


if __name__ == "__main__":
    main()
