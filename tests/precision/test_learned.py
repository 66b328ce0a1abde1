"""The learned policy: its network, its decision, the file that carries it, the engine that asks it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

import taper
from taper.config import ModelConfig, RopeConfig
from taper.engine import Engine, Request, SamplingParams
from taper.errors import CorruptFileError, UsageError
from taper.formats.container import TaperFile
from taper.formats.learned import MAX_WEIGHTS, LearnedScheduler, PredictorWeights, hidden_size
from taper.formats.writer import rewrite_header
from taper.models import Decoder
from taper.precision import StepContext, parse_policy
from taper.precision.learned import Learned, padded, predict, progressive_of, schedule_of
from taper.testing.tiny import tiny_config, tiny_taper

HEADS, HEAD_DIM, SEGMENTS = 2, 16, 4
FEATURES = HEADS * HEAD_DIM


def random_weights(seed=0, heads=HEADS, head_dim=HEAD_DIM, hidden=8, classes=SEGMENTS + 1):
    generator = np.random.default_rng(seed)
    shapes = PredictorWeights.shapes(heads, head_dim, hidden, classes)
    arrays = {name: generator.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    return PredictorWeights(**{name: array.astype(np.float32) for name, array in arrays.items()})


def always(label, classes=SEGMENTS + 1):
    """Weights that give one class whatever the prompt."""
    weights = random_weights(classes=classes)
    bias = np.zeros(classes, np.float32)
    bias[label] = 1
    return dataclasses.replace(weights, class_weight=np.zeros_like(weights.class_weight), class_bias=bias)


def scheduler(*predictors, widths=(4, 2), prefill_bits=8):
    return LearnedScheduler(widths, prefill_bits, SEGMENTS, predictors or (random_weights(),), {"text": "t"})


def prompt(tokens, seed):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((tokens, HEAD_DIM)), generator.standard_normal((tokens, HEAD_DIM))


def by_loops(weights, keys, values):
    """The paper's formulas, one query and one token at a time."""
    pooled = np.zeros((HEADS, HEAD_DIM))
    for head in range(HEADS):
        for query in range(HEADS):
            scores = np.array([weights.query[head, query] @ key for key in keys]) / np.sqrt(HEAD_DIM)
            shares = np.exp(scores) / np.exp(scores).sum()
            pooled[head] += sum(share * value for share, value in zip(shares, values, strict=True)) / HEADS
    z = pooled.T.reshape(-1)
    normed = (z - z.mean()) / np.sqrt(z.var() + 1e-5) * weights.norm_gain + weights.norm_bias
    hidden = np.maximum(weights.hidden_weight @ normed + weights.hidden_bias, 0)
    return weights.class_weight @ hidden + weights.class_bias


def test_network_is_the_papers():
    weights, (keys, values) = random_weights(), prompt(7, 1)
    found = predict(weights, padded([(keys, values)])).logits[0]
    np.testing.assert_allclose(found, by_loops(weights, keys, values), rtol=1e-9, atol=1e-9)


def test_batch_gives_each_prompt_what_it_gets_alone():
    """Prompts of several lengths: neither padding nor a neighbour may leak into a row."""
    weights, prompts = random_weights(), [prompt(tokens, seed) for seed, tokens in enumerate((1, 5, 12, 5))]
    together = predict(weights, padded(prompts)).logits
    alone = [predict(weights, padded([one])).logits[0] for one in prompts]
    np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-9)
    assert len({row.round(6).tobytes() for row in together}) == len(prompts)


@pytest.mark.parametrize(
    ("widths", "classes", "points"),
    [
        ((4, 2), (0,), ((4, 0), (2, 1))),
        ((4, 2), (1,), ((4, 0), (2, 10))),
        ((4, 2), (4,), ((4, 0),)),
        ((4, 3, 2), (1, 3), ((4, 0), (3, 10), (2, 30))),
        ((4, 3, 2), (2, 2), ((4, 0), (2, 20))),
        ((4, 3, 2), (3, 1), ((4, 0), (2, 30))),
        ((4, 3, 2), (4, 1), ((4, 0),)),
        ((4, 3, 2), (2, 4), ((4, 0), (3, 20))),
        ((5, 4, 3, 2), (0, 0, 2), ((5, 0), (3, 1), (2, 20))),
    ],
)
def test_each_pair_of_widths_has_its_own_switch(widths, classes, points):
    """The released code of the paper takes the first pair's switch for all of them."""
    found = progressive_of(widths, classes, SEGMENTS, 40, 8)
    assert found.points == points
    assert found.prefill_bits == 8


def test_switch_is_never_before_the_first_decode_pass():
    assert progressive_of((4, 2), (1,), 8, 3, 4).points == ((4, 0), (2, 1))


def step(phase, num_generated, kv=None, max_tokens=40):
    return StepContext(phase, 5, num_generated, max_tokens, 2, 8, None, False, kv)


def test_decision_is_made_once_and_lazily():
    calls = []
    keys = np.random.default_rng(0).standard_normal((HEADS, 5, HEAD_DIM)).astype(np.float32)

    def kv():
        calls.append(1)
        return keys, keys

    policy = Learned(scheduler(always(2)))
    bits = [policy.bits(step("prefill", 0, kv))]
    assert not calls
    bits += [policy.bits(step("decode", n, kv)) for n in range(1, 40)]
    assert bits == [8] + [4] * 19 + [2] * 20
    assert len(calls) == 1


def test_next_prompt_decides_anew():
    """One policy object for two requests: the second must not run the first one's schedule."""
    policy, learned = Learned(scheduler(random_weights(3))), scheduler(random_weights(3))
    found = []
    for seed in range(8):
        entries = tuple(
            np.random.default_rng([seed, 0]).standard_normal((2, HEADS, 9, HEAD_DIM)).astype("f4")
        )
        policy.bits(step("prefill", 0))
        bits = [policy.bits(step("decode", n, lambda entries=entries: entries)) for n in range(1, 40)]
        schedule = schedule_of(learned, entries, 40)
        assert bits == [schedule.bits(step("decode", n)) for n in range(1, 40)]
        found.append(tuple(bits))
    assert len(set(found)) > 1


def test_policy_needs_the_kv_cache():
    policy = Learned(scheduler())
    with pytest.raises(UsageError, match="needs the KV cache"):
        policy.bits(step("decode", 1))


def test_prompts_decide():
    """Different prompts get different schedules from one scheduler, each always the same."""
    learned = scheduler(random_weights(3))
    entries = [
        tuple(np.random.default_rng([seed, part]).standard_normal((HEADS, 9, HEAD_DIM)).astype(np.float32)
              for part in (0, 1))
        for seed in range(8)
    ]  # fmt: skip
    found = [schedule_of(learned, one, 40) for one in entries]
    assert len({one.points for one in found}) > 1
    assert found == [schedule_of(learned, one, 40) for one in entries]


# The file


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_taper(tmp_path_factory.mktemp("learned") / "plain.taper")


@pytest.fixture
def with_scheduler(plain, tmp_path):
    """A copy of the tiny file with this scheduler in its header."""

    def build(learned):
        path = tmp_path / "learned.taper"
        shutil.copy(plain, path)
        rewrite_header(path, dataclasses.replace(TaperFile.open(path).header, learned=learned))
        return path

    return build


def test_scheduler_comes_back_as_written(with_scheduler):
    written = scheduler(random_weights(1), random_weights(2), widths=(4.5, 3, 2))
    read = TaperFile.open(with_scheduler(written), verify=True).learned
    assert (read.widths, read.prefill_bits, read.num_segments) == ((4.5, 3, 2), 8, SEGMENTS)
    assert read.record == {"text": "t"}
    for wrote, got in zip(written.predictors, read.predictors, strict=True):
        assert {name: array.tobytes() for name, array in wrote.arrays.items()} == {
            name: array.tobytes() for name, array in got.arrays.items()
        }


def change(key, value):
    return lambda raw: raw | {key: value}


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (change("widths", [4]), "not a list of 2 to 8 widths"),
        (change("widths", [2, 4]), "do not fall"),
        (change("widths", [4, 4]), "do not fall"),
        (change("widths", [4, "2"]), "is not a number"),
        (change("widths", [4, float("nan")]), "not a finite number"),
        (change("prefill_bits", 3), "prefill_bits 3 are below the first width 4"),
        (change("prefill_bits", float("inf")), "not a finite number"),
        (change("segments", 0), "segments 0 is outside 1..64"),
        (change("segments", 10**9), "outside 1..64"),
        (change("segments", True), "not an integer"),
        (change("hidden", 10**9), "hidden 1000000000 is outside 1..256"),
        (change("hidden", 9), "not the base64 text of"),
        (change("weights", []), "not those of 1 pairs"),
        (change("weights", ["AAAA"]), "not the base64 text of"),
        (change("weights", [["AAAA"]]), "not the base64 text of"),
        (lambda raw: raw | {"weights": ["!" * len(raw["weights"][0])]}, "base64|character"),
        (lambda raw: raw | {"weights": ["AHwA" + raw["weights"][0][4:]]}, "not finite"),
        (change("record", 1), "record is not a JSON object"),
        (lambda raw: {key: raw[key] for key in raw if key != "weights"}, "'weights' is missing"),
    ],
)
def test_forged_scheduler_is_refused(with_scheduler, monkeypatch, forge, reason):
    """The forged text gets a right checksum: only the checks of its content can refuse it."""
    from taper.formats import writer

    honest = LearnedScheduler.to_dict
    path = with_scheduler(scheduler())
    monkeypatch.setattr(LearnedScheduler, "to_dict", lambda self: forge(honest(self)))
    monkeypatch.setattr(writer, "validate", lambda *args: None)
    monkeypatch.setattr(writer, "_json", lambda value: json.dumps(value, separators=(",", ":")))
    rewrite_header(path, TaperFile.open(path).header)
    monkeypatch.undo()
    with pytest.raises(CorruptFileError, match=reason):
        TaperFile.open(path)


def test_size_is_bounded_before_anything_is_decoded():
    config = ModelConfig("LlamaForCausalLM", 8192, 8, 1, 64, 64, 128, 300, 256, 1e-5, RopeConfig(), True)
    raw = scheduler().to_dict() | {"widths": [5, 4, 3, 2], "hidden": 256, "weights": ["", "", ""]}
    with pytest.raises(ValueError, match=rf"the most is {MAX_WEIGHTS:,}"):
        LearnedScheduler.from_dict(raw, config)


@pytest.mark.parametrize(
    ("features", "hidden"), [(32, 32), (256, 256), (1024, 256), (4096, 64), (1 << 20, 1)]
)
def test_hidden_layer_narrows_for_wide_caches(features, hidden):
    assert hidden_size(features) == hidden


# The policy's text and the engine


def test_text_needs_a_scheduler_and_its_widths():
    with pytest.raises(UsageError, match="no learned scheduler") as error:
        parse_policy("learned", 2, 8)
    assert "taper tune" in error.value.hint
    with pytest.raises(UsageError, match="asks for 4 bits; this model holds 2 to 3 bits"):
        parse_policy("learned", 2, 3, learned=scheduler())
    with pytest.raises(UsageError, match="fraction needs a file with sensitivity"):
        parse_policy("learned", 2, 8, learned=scheduler(widths=(3.5, 2)))
    with pytest.raises(UsageError, match="takes nothing more"):
        parse_policy("learned:3", 2, 8, learned=scheduler())
    assert parse_policy("learned", 2, 8, learned=scheduler()).name == "learned"


PROMPT = [int(token) for token in np.random.default_rng(0).integers(2, 300, 23)]


def test_engine_runs_the_schedule_that_the_prompt_decides(plain, with_scheduler):
    """Bits are those of the network over a prompt pass of one's own, tokens those of that schedule."""
    learned = scheduler(random_weights(1), random_weights(101), widths=(6, 4, 2))
    llm = taper.load(with_scheduler(learned))
    decoder = Decoder.from_taper(TaperFile.open(plain))
    options = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}
    seen = set()
    for seed in range(6):
        prompt_ids = [int(token) for token in np.random.default_rng(seed).integers(2, 300, 20)]
        cache = decoder.new_cache(64)
        decoder.forward(prompt_ids, cache, 8, "none")
        schedule = schedule_of(learned, cache.entries(-1), 40)
        answer = llm.generate(prompt_ids, policy="learned", **options)
        wanted = llm.generate(prompt_ids, policy=schedule, **options)
        assert answer.policy == "learned"
        assert (answer.bits, answer.token_ids) == (wanted.bits, wanted.token_ids)
        seen.add(answer.bits)
    assert len(seen) > 1, "the prompts were to differ"


def test_decision_does_not_depend_on_how_the_prompt_is_cut(plain):
    decoder = Decoder.from_taper(TaperFile.open(plain))
    learned = scheduler(random_weights(3))
    found = set()
    for chunk in (1, 7, 16, 256):
        request = Request(
            PROMPT, Learned(learned), SamplingParams(temperature=0.0), max_tokens=12, ignore_eos=True
        )
        found.add(Engine(decoder, None, chunk).generate(request).bits)
    assert len(found) == 1


def test_cache_shows_its_entries_in_order(plain):
    """Keys lie in blocks of 16; 23 of them fill one and a half."""
    decoder = Decoder.from_taper(TaperFile.open(plain))
    cache = decoder.new_cache(40)
    decoder.forward(PROMPT, cache, 4, "none")
    keys, values = cache.entries(-1)
    assert keys.shape == values.shape == (2, len(PROMPT), tiny_config().head_dim)
    assert keys.dtype == values.dtype == np.float32
    for token in (0, 15, 16, 22):
        block, place = divmod(token, 16)
        np.testing.assert_array_equal(keys[:, token], cache.layers[-1].keys[:, block, :, place])
        np.testing.assert_array_equal(values[:, token], cache.layers[-1].values[:, token])
    assert np.abs(keys).min(axis=(0, 2)).all()
