"""The harness's generation options in the engine's terms."""

from __future__ import annotations

import pytest

from taper.errors import UsageError
from taper.evaluate.requests import generation_options


def test_greedy_unless_sampling_is_asked_for() -> None:
    options = generation_options({"until": ["\n", "Q:"], "do_sample": False, "temperature": 0.7}, 256, 2048)
    assert options == {"stop": ("\n", "Q:"), "max_tokens": 256, "temperature": 0.0}
    assert generation_options({"until": "\n", "temperature": 0.0}, 256, 2048)["temperature"] == 0.0
    assert generation_options({}, 256, 2048) == {"stop": (), "max_tokens": 256, "temperature": 0.0}
    sampled = generation_options({"do_sample": True, "top_p": 0.9, "seed": 3}, 256, 2048)
    assert sampled == {"stop": (), "max_tokens": 256, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    assert generation_options({"temperature": 0.5}, 256, 2048)["temperature"] == 0.5


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_limits(name: str) -> None:
    assert generation_options({name: 7}, 256, 2048)["max_tokens"] == 7
    assert generation_options({name: 4096}, 256, 2048)["max_tokens"] == 2047


def test_an_option_that_would_be_dropped_is_refused() -> None:
    with pytest.raises(UsageError, match="'num_beams' is not known"):
        generation_options({"num_beams": 4}, 256, 2048)
    assert "num_beams" not in generation_options({"num_beams": None}, 256, 2048)
