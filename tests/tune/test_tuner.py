"""A whole tuning on a tiny model: costs, search, test, controls, and going on after an interruption."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from taper.errors import UsageError
from taper.tune import costs as costs_module
from taper.tune import tuner
from taper.tune.costs import Costs, measure_costs
from taper.tune.schedule import Schedule
from taper.tune.tuner import TuneOptions, tune


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    random = np.random.default_rng(5)
    words = ["the", "cat", "hat", "in", "on", "and", "man", "ring", "stone", "is", "was", "old"]
    documents = [" ".join(random.choice(words, 40)) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture
def options(text, tmp_path):
    return TuneOptions(
        task="words",
        path=text,
        work=tmp_path / "work",
        max_loss=0.05,
        objective="bits",
        widths=(8, 6, 4, 2),
        num_segments=3,
        search_prompts=10,
        held_out_prompts=30,
        prompt_tokens=6,
        max_tokens=9,
    )


def without_times(report):
    def untimed(row):
        return row and dataclasses.replace(row, token_ms=None)

    return dataclasses.replace(
        report,
        winner=untimed(report.winner),
        shown=untimed(report.shown),
        controls=tuple(map(untimed, report.controls)),
    )


@pytest.mark.parametrize("loss", ["likelihood", "kl", "rouge", "rouge-model"])
def test_winner_is_within_the_limit_and_has_its_controls(model, options, loss):
    report = tune(model, dataclasses.replace(options, loss=loss))
    assert report.num_schedules == 35
    assert report.held_out_prompts == report.held_out_documents == 30
    roles = [row.role for row in report.controls]
    assert roles[:4] == ["uniform 8", "uniform 6", "uniform 4", "uniform 2"]
    high = report.controls[0]
    assert (high.loss, high.upper, high.saved_frac) == (0.0, 0.0, 0.0)
    if report.winner is not None:
        assert report.winner.upper < 0.05
        assert report.winner.bits in [row.bits for row in report.candidates]
        assert {"reverse order", "flat mix", "random order"} <= {*roles}
        assert report.evidence()["policy"] == report.winner.policy
    passed = [row.upper < 0.05 for row in report.candidates]
    assert all(passed[:-1])
    assert not options.work.exists()


def test_likelihood_tunes_this_model_to_fewer_bits(model, options):
    report = tune(model, options)
    assert report.winner is not None
    assert report.winner.average_bits < 8
    assert report.winner.cost == pytest.approx(
        Costs("bits", {b: b for b in (8, 6, 4, 2)}, {b: b for b in (8, 6, 4, 2)}).of(
            schedule_of(report.winner.bits, 9)
        )
    )
    assert report.shown == report.winner
    assert all(row.token_ms > 0 for row in report.controls)
    assert report.engine_saved_frac == 1 - report.shown.token_ms / report.controls[0].token_ms
    assert report.to_dict()["winner"]["policy"] == report.winner.policy


def schedule_of(key, max_tokens):
    prefill, _, points = key.partition("/")
    starts = [(float(bits), int(start)) for bits, start in (p.split("@") for p in points.split(","))]
    ends = [start for _, start in starts[1:]] + [max_tokens]
    return Schedule(float(prefill), tuple((b, end - s) for (b, s), end in zip(starts, ends, strict=True)))


@pytest.mark.parametrize("at", [3, 12, 25, 45])
def test_interrupted_run_goes_on_to_the_same_result(model, options, tmp_path, at):
    whole = tune(model, dataclasses.replace(options, work=tmp_path / "other"))
    calls = 0

    def stop(what, done_frac, left_s):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, options, stop)
    assert options.work.exists()
    assert without_times(tune(model, options)) == without_times(whole)


def test_unfinished_work_of_other_options_is_not_mixed_in(model, options):
    def stop(what, done_frac, left_s):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, options, stop)
    with pytest.raises(UsageError, match=r"unfinished work of another max_loss"):
        tune(model, dataclasses.replace(options, max_loss=0.1))


def test_impossible_limit_leaves_no_winner(model, options):
    report = tune(model, dataclasses.replace(options, max_loss=1e-12))
    assert report.winner is None
    assert report.candidates == ()
    assert [row.role for row in report.controls][-1] == "uniform 2"


def test_failed_ladder_shows_its_safest_candidate(model, options, monkeypatch):
    monkeypatch.setattr("taper.tune.held_out.upper_bound", lambda terms: 1.0)
    report = tune(model, options)
    assert report.winner is None
    assert len(report.candidates) == 1
    assert report.shown.role == "safest candidate"
    assert report.shown.bits == report.candidates[0].bits


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": "bleu"}, "loss 'bleu' is none of likelihood"),
        ({"objective": "money"}, "objective 'money' is none of time"),
        ({"max_loss": 0.0}, "limit of the loss is 0"),
        ({"high_bits": 9}, "9"),
        ({"high_bits": 4}, "width 8 is above the high width 4"),
        ({"widths": (8,)}, "8 bits alone leave nothing"),
        ({"held_out_prompts": 12}, "12 held-out documents are too few"),
        ({"held_out_prompts": 500}, "has 296 prompts"),
        ({"num_segments": 10}, "10 segments of 9 tokens"),
        ({"against": "x"}, "--against belongs to a loss against a model"),
    ],
)
def test_bad_options_say_why(model, options, change, reason):
    with pytest.raises(UsageError, match=reason):
        tune(model, dataclasses.replace(options, **change))
    assert not options.work.exists()


def test_costs_are_measured_for_every_width(decoder):
    costs = measure_costs(decoder, [1, 2, 3], 8, (2, 8), "time")
    assert set(costs.prefill) == set(costs.decode) == {2, 8}
    assert all(cost > 0 for cost in [*costs.prefill.values(), *costs.decode.values()])
    made = Costs("time", {8: 9.0}, {8: 2.0, 4: 1.0})
    assert made.of(Schedule(8, ((8, 3), (4, 2)))) == (9.0 + 2 * 2.0 + 2 * 1.0) / 5
    assert made.with_widths(Costs("time", {3: 1.0}, {3: 0.5, 8: 7.0})).decode == {8: 2.0, 4: 1.0, 3: 0.5}


def test_energy_is_read_from_the_meter_or_refused(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(costs_module, "RAPL", tmp_path / "energy_uj")
    with pytest.raises(UsageError, match="energy meter"):
        measure_costs(decoder, [1], 4, (2,), "energy")
    (tmp_path / "energy_uj").write_text("5000\n")
    assert measure_costs(decoder, [1], 4, (2,), "energy").decode == {2: 0.0}


def test_tuner_counts_documents_not_prompts(model, options, text, monkeypatch):
    monkeypatch.setattr(tuner, "LEAST_DOCUMENTS", 31)
    with pytest.raises(UsageError, match="30 held-out documents"):
        tune(model, options)
