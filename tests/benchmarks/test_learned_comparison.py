"""The comparison of the learned policy: equal average bits, the engine's answers, a whole run."""

from __future__ import annotations

import json

import learned as bench
import numpy as np
import pytest
from general_text import general_documents

from taper.engine import Engine, Request, SamplingParams
from taper.evaluate.sequences import rouge_l
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.precision import parse_policy
from taper.testing.tiny import tiny_taper
from taper.tokenizer import Tokenizer
from taper.tune.learned_labels import with_greedy_answers
from taper.tune.prompts import PromptSet

PROMPT = tuple(int(token) for token in np.random.default_rng(0).integers(2, 300, 23))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_taper(tmp_path_factory.mktemp("bench") / "tiny.taper", tie_word_embeddings=False)


def test_high_passes_are_those_of_the_schedules():
    """Of 40 tokens one comes from the prompt: 39 decode passes, of which a switch at token n leaves n - 1."""
    assert bench.high_passes(4, 40).tolist() == [0, 9, 19, 29, 39]


def test_static_policy_has_the_same_bits_and_the_mixed_loss():
    passes = bench.high_passes(4, 40)
    damage = np.array([[0.4, 0.3, 0.2, 0.1, 0.0], [0.8, 0.7, 0.2, 0.2, 0.0]])
    np.testing.assert_allclose(bench.static_loss(damage, passes, 9), damage[:, 1])
    np.testing.assert_allclose(
        bench.static_loss(damage, passes, 11.5), 0.75 * damage[:, 1] + 0.25 * damage[:, 2]
    )
    np.testing.assert_allclose(bench.static_loss(damage, passes, 0), damage[:, 0])
    np.testing.assert_allclose(bench.static_loss(damage, passes, 39), damage[:, 4])


def test_switches_that_follow_the_losses_beat_static_and_shuffled():
    """Two kinds of prompts, one of which loses nothing at the low width."""
    passes = bench.high_passes(4, 40)
    slopes = np.tile([0.0, 1.0], 20)
    damage = slopes[:, None] * (1 - passes / 39)
    good = bench.compare_divergence("t", damage, np.where(slopes > 0, 4, 0), passes)
    assert good.means["learned"] == good.means["oracle"] == 0
    assert good.means["static"] == pytest.approx(0.25)
    assert good.means["shuffled"] == pytest.approx(0.25)
    assert good.difference + good.half_width < 0
    bad = bench.compare_divergence("t", damage, np.where(slopes > 0, 0, 4), passes)
    assert bad.difference - bad.half_width > 0
    same = bench.compare_divergence("t", damage, np.full(40, 2), passes)
    assert same.difference == pytest.approx(0)


def test_interval_leaves_out_what_equal_bits_cancel():
    """Losses in proportion to the bits say nothing between policies of equal bits; noise does."""
    generator = np.random.default_rng(0)
    passes = generator.choice([9.0, 19.0, 29.0], 400)
    proportional = -0.01 * (passes - passes.mean())
    assert bench.at_equal_bits(proportional, passes) == pytest.approx((0, 0), abs=1e-12)
    noise = 0.5 + generator.standard_normal(400)
    mean, half_width = bench.at_equal_bits(proportional + noise, passes)
    assert mean == pytest.approx(noise.mean())
    assert half_width == pytest.approx(1.96 / 20, rel=0.1)
    assert bench.at_equal_bits(noise, np.full(400, 9.0))[1] == pytest.approx(1.96 / 20, rel=0.1)


def test_general_text_leaves_dialogue_out():
    text = "naïve prose|spoken words|".encode() * 40
    rows = [
        {"split": "train", "domain": domain, "offset": at * 26 + begin, "bytes": length}
        for at in range(40)
        for domain, begin, length in (("fiction", 0, 12), ("dialogue", 13, 12))
    ]
    found = general_documents(text, rows, ["a story"] * 3)
    assert sorted(found) == ["a story"] * 3 + ["naïve prose"] * 40
    assert found != sorted(found)


def test_greedy_answers_are_the_engines(model):
    file = TaperFile.open(model)
    decoder, tokenizer = Decoder.from_taper(file), Tokenizer(file.tokenizer_json)

    def answer(policy):
        request = Request(PROMPT, parse_policy(policy, 2, 8), SamplingParams(temperature=0.0), max_tokens=12)
        return tokenizer.decode(Engine(decoder, None).generate(request).token_ids)

    switches = {"early": 2, "late": 7, "never": 11, "low": 0}
    found = bench.greedy_losses(
        decoder,
        tokenizer,
        bench.LearnedScheduler((4, 2), 8, 4, (), {}),
        with_greedy_answers(decoder, PromptSet("t", (PROMPT,), 12, ((),), (0,)), 8),
        {name: np.array([count]) for name, count in switches.items()},
    )
    wanted = answer("fixed:8")
    for name, count in switches.items():
        text = answer(f"progressive:8/4@0,2@{count + 1}")
        assert found[name][0] == pytest.approx(1 - rouge_l(wanted, text)), name


def test_run_prints_every_task_and_one_json_object(model, tmp_path, capsys):
    random = np.random.default_rng(5)
    words = ["the", "cat", "hat", "in", "on", "and", "man", "ring", "stone", "is", "was", "old"]
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text("\n<|endoftext|>\n".join(" ".join(random.choice(words, 40)) for _ in range(24)))
    sizes = ["--train-prompts", "20", "--prompts", "6", "--prompt-tokens", "10", "--max-tokens", "8"]
    options = [str(model), "--train", str(texts[0]), "--task", str(texts[1]), "--widths", "4,2", *sizes]
    assert bench.main([*options, "--segments", "4", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["tasks"][0]
    assert [row["loss"] for row in found["rows"]] == [
        "KL along the text", "KL along the answer", "1 - ROUGE-L, greedy",
    ]  # fmt: skip
    assert sum(found["classes"]) == 6
    assert 2 <= found["average_bits"] <= 4
    assert 0 < found["decision_share_median"] < 1
    assert any("learned - static" in line for line in lines)
