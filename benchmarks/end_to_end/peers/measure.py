"""What the runners of this folder share: their options and the two figures that they take."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHORT_PROMPT_TOKENS = 4
FIRST_WORD = 300


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        checkpoint: Hugging Face folder of random weights (`checkpoint.py`).
        model: what the program reads; converted from the checkpoint where it is missing.
        threads: of the program.
        prompt: tokens of the prompt whose reading is timed.
        generate: tokens whose generation is timed.
        hint: the one choice that a program has, None for its default.
    """

    checkpoint: Path
    model: Path
    threads: int
    prompt: int
    generate: int
    hint: str | None


# Takes a prompt (tokens,) and the number of tokens to generate; returns the seconds to the first token and
# the seconds of each later one.
Generate = Callable[[np.ndarray, int], tuple[float, float]]


def settings(text: str, hint: tuple[str, str] | None = None) -> Settings:
    """Read the command line; `hint` is the name and help of the program's own option."""
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    if hint is not None:
        parser.add_argument(hint[0], dest="hint", help=hint[1])
    return Settings(**{"hint": None, **vars(parser.parse_args())})


def measure(given: Settings, generate: Generate) -> dict[str, float | None]:
    """Prefill of `given.prompt` tokens and decoding of `given.generate` after a short prompt, each after a
    warm-up on other tokens; what is asked for with 0 tokens is None.
    """
    generator = np.random.default_rng()

    def tokens(count: int) -> np.ndarray:
        return generator.integers(FIRST_WORD, 32000, count)

    prefill = decode = None
    if given.prompt:
        generate(tokens(given.prompt), 1)
        prefill = given.prompt / generate(tokens(given.prompt), 1)[0]
    if given.generate:
        generate(tokens(SHORT_PROMPT_TOKENS), 8)
        decode = 1 / generate(tokens(SHORT_PROMPT_TOKENS), given.generate + 1)[1]
    return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
