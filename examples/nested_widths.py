"""One file, every width: how the answer changes. python examples/nested_widths.py [MODEL]."""

from __future__ import annotations

import sys

import taper


def main() -> None:
    """Print the greedy answer at each width and the bytes that a token read."""
    llm = taper.load(sys.argv[1] if len(sys.argv) > 1 else None)
    for bits in range(llm.min_bits, llm.max_bits + 1):
        answer = llm.generate("Once upon a time", policy=f"fixed:{bits}", max_tokens=32)
        print(f"{bits} bits, {answer.usage.bytes_per_token / 1e6:.2f} MB per token:{answer.text}\n")


if __name__ == "__main__":
    main()
