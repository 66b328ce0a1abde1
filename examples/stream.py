"""Stream an answer and show the bits of every token: python examples/stream.py [MODEL] [PROMPT]."""

from __future__ import annotations

import sys

import taper


def main() -> None:
    """Print each piece with its bits, then the figures of the run."""
    model = sys.argv[1] if len(sys.argv) > 1 else None
    prompt = sys.argv[2] if len(sys.argv) > 2 else "Once upon a time"
    llm = taper.load(model)
    print(prompt, end="")
    with llm.stream(prompt, policy="progressive", max_tokens=64, temperature=0.7, seed=1) as stream:
        for step in stream:
            print(f"{step.text}[{step.bits}]", end="", flush=True)
        usage = stream.completion().usage
    print(f"\n{usage.decode_tokens_per_s:.1f} token/s, {usage.average_bits:.2f} bits on average,", end=" ")
    print(f"{usage.bytes_per_token / 1e6:.2f} MB read per token")


if __name__ == "__main__":
    main()
