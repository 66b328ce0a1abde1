"""Agreement of continuations: with itself everything, and figures from known token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from taper.errors import UsageError
from taper.evaluate.generation import compare, measure_generation, spaced_prompts
from taper.testing.tiny import tiny_hf_dir, tiny_taper, tiny_tokenizer_json
from taper.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tiny_tokenizer_json())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    words = np.random.default_rng(0).choice(["the", "sea", "of", "rain", "and", "x"], 500)
    path.write_text(" ".join(words))
    return path


def test_a_checkpoint_agrees_with_itself(tmp_path: Path, text: Path) -> None:
    folder = tiny_hf_dir(tmp_path / "hf")
    seen: list[float] = []
    report = measure_generation(
        folder, text, folder, num_prompts=2, progress=lambda what, done: seen.append(done)
    )
    (result,) = report.results
    assert (result.rouge_l, result.identical_frac, result.bits) == (1.0, 1.0, 32)
    assert (report.num_prompts, report.prompt_tokens, report.new_tokens) == (2, 64, 64)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_another_model_does_not(tmp_path: Path, text: Path) -> None:
    report = measure_generation(
        tiny_taper(tmp_path / "t.taper", 2, 3), text, tiny_hf_dir(tmp_path / "hf"), num_prompts=2
    )
    assert [result.bits for result in report.results] == [2, 3]
    assert all(result.identical_frac == 0.0 and result.prefix_tokens < 64 for result in report.results)


def test_figures_of_known_tokens() -> None:
    a, b = TOKENIZER.encode("in the water of the sea"), TOKENIZER.encode("in the town of the sea")
    same = len([1 for x, y in zip(a, b, strict=False) if x == y])
    assert same >= 2
    result = compare(3, TOKENIZER, [a, a], [a, b])
    # One continuation has all six words in common, the other five: F1 1 and 5/6.
    assert result.rouge_l == pytest.approx((1 + 5 / 6) / 2)
    assert result.rouge_l_standard_error == pytest.approx((1 / 6) / 2)
    assert result.identical_frac == 0.5
    first = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    assert result.prefix_tokens == (len(a) + first) / 2
    assert compare(3, TOKENIZER, [a], [a]).rouge_l_standard_error is None


def test_prompts_span_the_text() -> None:
    text = "#" * 100
    prompts = spaced_prompts("0" + text + "1", TOKENIZER, 3, 10)
    assert prompts.shape == (3, 10)
    assert TOKENIZER.decode(prompts[0].tolist())[0] == "0"
    assert TOKENIZER.decode(prompts[2].tolist())[-1] == "1"
    for count, length in ((0, 10), (11, 10)):
        with pytest.raises(UsageError, match=f"{count} prompts of {length} tokens"):
            spaced_prompts(text, TOKENIZER, count, length)
