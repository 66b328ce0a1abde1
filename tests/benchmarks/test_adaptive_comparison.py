"""The comparison of the rule that decides at every token: its shares, its answers, a whole run."""

from __future__ import annotations

import json

import adaptive as bench
import numpy as np
import pytest

from taper.engine import Engine, Request, SamplingParams
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.precision import StepContext
from taper.testing.tiny import tiny_taper
from taper.tune.prompts import PromptSet

PROMPTS = tuple(
    tuple(int(token) for token in np.random.default_rng(seed).integers(2, 300, 9 + seed)) for seed in range(3)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_taper(tmp_path_factory.mktemp("bench") / "tiny.taper", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def damage():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 300, 5000).astype(np.int32)
    return bench.Damage(tokens, tokens / 300 + 0.1 * generator.standard_normal(5000), 300)


def test_damage_is_the_mean_after_each_token_drawn_to_the_average_where_it_is_rare():
    found = bench.Damage(np.array([1] * 90 + [2]), np.array([0.2] * 90 + [9.2]), 4)
    mean = (90 * 0.2 + 9.2) / 91
    assert found.by_token[1] == pytest.approx((90 * 0.2 + 10 * mean) / 100)
    assert found.by_token[2] == pytest.approx((9.2 + 10 * mean) / 11)
    assert found.by_token[3] == pytest.approx(mean)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_rule_keeps_its_share_whatever_the_tokens(damage, share):
    """Also on text whose tokens all lie above the training text's threshold."""
    for lowest in (0, 200):
        tokens = np.random.default_rng(1).integers(lowest, 300, 400)
        rule = bench.adaptive(damage, 4, 2, lambda n: share)
        high = np.mean([rule(n, token) == 4 for n, token in enumerate(tokens, 1)])
        assert high == pytest.approx(share, abs=0.1)
    assert all(bench.adaptive(damage, 4, 2, lambda n: 1.0)(n, 0) == 4 for n in range(1, 9))


def test_rule_gives_the_bits_to_the_tokens_that_need_them(damage):
    rule = bench.adaptive(damage, 4, 2, lambda n: 0.5)
    tokens = np.random.default_rng(2).integers(0, 300, 1000)
    high = np.array([rule(n, token) == 4 for n, token in enumerate(tokens, 1)])
    assert tokens[high].mean() > 1.8 * tokens[~high].mean()


def test_answers_side_by_side_are_the_engines(model, damage):
    decoder = Decoder.from_taper(TaperFile.open(model))
    prompts = PromptSet("t", PROMPTS, 10, ((),) * 3, (0, 1, 2))
    tokens, rows, mean_bits = bench.answers(
        decoder, prompts, lambda: bench.adaptive(damage, 4, 2, lambda n: 0.5), forced=False
    )

    class Same:
        """The rule as a policy; it hears of a token before the next pass."""

        name = "same"

        def __init__(self):
            self.rule = bench.adaptive(damage, 4, 2, lambda n: 0.5)
            self.token = None

        def bits(self, step: StepContext) -> float:
            return 8 if step.phase == "prefill" else self.rule(step.num_generated, self.token)

    widths = []
    for prompt, answer in zip(PROMPTS, tokens, strict=True):
        policy = Same()
        sampling = SamplingParams(temperature=0.0)
        request = Request(prompt, policy, sampling, max_tokens=10, ignore_eos=True)
        given = []
        for step in Engine(decoder, None).stream(request):
            policy.token = step.token_id
            given.append(step.token_id)
            widths += [step.bits] if len(given) > 1 else []
        assert given == answer
    assert mean_bits == pytest.approx(np.mean(widths))
    assert {2, 4} == set(widths)
    assert [len(row) for row in rows] == [10, 10, 10]


def test_run_compares_every_policy_and_prints_one_json_object(model, tmp_path, capsys):
    random = np.random.default_rng(5)
    words = ["the", "cat", "hat", "in", "on", "and", "man", "ring", "stone", "is", "was", "old"]
    text = tmp_path / "a.txt"
    text.write_text("\n<|endoftext|>\n".join(" ".join(random.choice(words, 40)) for _ in range(24)))
    sizes = ["--train-tokens", "300", "--prompts", "4", "--prompt-tokens", "10", "--max-tokens", "8"]
    options = [str(model), "--train", str(text), "--task", str(text), "--widths", "4,2", "--threads", "1"]
    assert bench.main([*options, *sizes]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert set(rows) == {"static", "adaptive", "settling", "alternate", "all high", "all low"}
    assert rows["static"]["losses"]["1 - ROUGE-L"]["beyond_static"] == 0
    assert rows["all high"]["text_bits"] == 4
    high, low = (rows[name]["losses"]["KL along the text"]["mean"] for name in ("all high", "all low"))
    assert high < low
