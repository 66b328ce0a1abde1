"""The measurement of policies: schedules that read what they say, scores that are the engine's, tables."""

from __future__ import annotations

import json
import lzma
import statistics
import sys
from pathlib import Path

import forcing
import numpy as np
import pmpd_report
import pytest
import schedules
import speed
from common import BenchmarkError
from pmpd_tasks import TASKS

import quality
import taper
from taper.engine import LLM, Request
from taper.testing.tiny import tiny_taper

TEXTS = (
    "fixed:{top}",
    "phase:3/2",
    "progressive:{top}/4@0,3@{1/3},2@{2/3}",
    "schedule:{top}/2@0,3@{1/3},4@{2/3}",
    "cycle:{top}/4,3,2",
    "progressive:{top}/4@0,3@{1/3}",
    "progressive",
)
LIMIT = 13
PROMPT = (5, 260, 17, 44, 200, 9)
REFERENCE = (3, 270, 30, 31, 32, 99, 281, 4, 6, 150, 77)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return taper.load(tiny_taper(tmp_path_factory.mktemp("model") / "tiny.taper"))


@pytest.mark.parametrize("limit", sorted({task.limit for task in TASKS.values()}))
@pytest.mark.parametrize("widths", list(schedules.FALLING))
def test_every_order_reads_the_same_bits(llm: LLM, limit: int, widths: str) -> None:
    wanted = statistics.fmean(float(width) for width in widths.split(", "))
    sides = (schedules.FALLING, schedules.REVERSE, schedules.MIXED)
    plans = []
    for texts in sides:
        bits = schedules.plan(schedules.policy_of(llm, texts[widths], limit), llm, 1, limit)
        assert bits is not None
        assert bits[0] == 8
        assert statistics.fmean(bits[1:]) == pytest.approx(wanted, abs=1e-12)
        plans.append(bits[1:])
    assert plans[0] == sorted(plans[0], reverse=True)
    assert plans[1] == plans[0][::-1]


def test_a_third_is_the_papers_switch(llm: LLM) -> None:
    # s = floor(64 / 3) = 21 decode passes at the high width, so the switch is at token 22.
    assert schedules.resolve("progressive:{top}@0,2@{1/3}", 6, 64) == "progressive:6@0,2@22"
    bits = schedules.plan(schedules.policy_of(llm, "progressive:3@0,2@{1/3}", 64), llm, 1, 64)
    assert bits is not None
    assert bits[1:] == [3] * 21 + [2] * 42


@pytest.mark.parametrize("text", ["schedule:6/2", "cycle:a/2", "schedule:6/2@1,3@4", "schedule:6/2@0,3@0"])
def test_bad_controls_are_refused(llm: LLM, text: str) -> None:
    with pytest.raises(BenchmarkError):
        schedules.policy_of(llm, text, 64)


@pytest.mark.parametrize("text", TEXTS)
def test_passes_in_one_are_the_engines_passes(llm: LLM, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, bits = forcing.OnePrompt(llm, PROMPT, REFERENCE, LIMIT).forced(text)
    monkeypatch.setattr(schedules, "COUNTING", ())
    stepwise, step_bits = forcing.OnePrompt(llm, PROMPT, REFERENCE, LIMIT).forced(text)
    assert together.shape == (len(REFERENCE), llm.config.vocab_size)
    assert bits == step_bits
    assert together.tobytes() == stepwise.tobytes()


def test_forced_entries_are_written_by_the_schedule(llm: LLM) -> None:
    one = forcing.OnePrompt(llm, PROMPT, REFERENCE, LIMIT)
    high, _ = one.forced("fixed:{top}")
    low, _ = one.forced("phase:{top}/2")
    assert high[0].tobytes() == low[0].tobytes()  # the prompt is read alike, the first token comes from it
    assert high[1].tobytes() != low[1].tobytes()
    model = llm.engine.model
    cache = model.new_cache(64)
    model.forward(PROMPT, cache, 8, "none")
    by_hand = model.forward(REFERENCE[:-1], cache, 2, "all")
    assert by_hand is not None
    assert low[1:].tobytes() == by_hand.tobytes()


def test_answers_of_a_batch_are_the_engines(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [PROMPT, PROMPT[:2], (*PROMPT, 8, 8, 120)]
    batch = [forcing.OnePrompt(llm, prompt_ids, REFERENCE, LIMIT) for prompt_ids in asked]
    for text in TEXTS:
        together = forcing.answers(llm, batch, text, LIMIT)
        for prompt_ids, (tokens, bits) in zip(asked, together, strict=True):
            policy = schedules.policy_of(llm, text, LIMIT)
            wanted = llm.engine.generate(Request(prompt_ids, policy, max_tokens=LIMIT))
            assert tokens == list(wanted.token_ids)
            assert bits == list(wanted.bits)
        with monkeypatch.context() as patch:
            patch.setattr(schedules, "COUNTING", ())
            assert forcing.answers(llm, batch, text, LIMIT) == together


def test_an_answer_of_a_batch_ends_at_the_models_stop(llm: LLM, tmp_path: Path) -> None:
    asked = [PROMPT, PROMPT[:2], (*PROMPT, 8, 8, 120)]
    free = [llm.generate(ids, policy="fixed:3", max_tokens=LIMIT).token_ids for ids in asked]
    stop = next(token for index, token in enumerate(free[1]) if index and token not in free[1][:index])
    stopping = taper.load(tiny_taper(tmp_path / "stop.taper", eos_token_ids=(stop,)))
    batch = [forcing.OnePrompt(stopping, ids, REFERENCE, LIMIT) for ids in asked]
    together = forcing.answers(stopping, batch, "fixed:3", LIMIT)
    wanted = [stopping.generate(ids, policy="fixed:3", max_tokens=LIMIT).token_ids for ids in asked]
    assert [tuple(tokens) for tokens, _ in together] == wanted
    assert wanted[1][-1] == stop
    assert len(wanted[1]) < LIMIT
    assert all(len(tokens) == len(bits) for tokens, bits in together)


def test_the_bootstrap_draws_documents() -> None:
    one_document = pmpd_report.Bootstrap.of([7, 7, 7]).interval([1.0, 2.0, 6.0])
    assert (one_document.value, one_document.low, one_document.high) == pytest.approx((3, 3, 3))
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    apart = pmpd_report.Bootstrap.of(range(400)).interval(values)
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)
    # Four prompts of a document that agree are one observation: twice the width.
    together = pmpd_report.Bootstrap.of(np.arange(400) // 4).interval(np.repeat(values[:100], 4))
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), rel=0.3)


def test_records_of_one_model_are_merged() -> None:
    def record(model: str, texts: str, **documents: int) -> dict[str, object]:
        tasks = {
            name: {"documents": [1] * count, "samples": {text: {} for text in texts if count}}
            for name, count in documents.items()
        }
        return {"model": model, "families": dict.fromkeys(texts, "family"), "tasks": tasks}

    found = pmpd_report.merged([record("m", "ab", x=1, y=0), record("m", "bc", z=1)])
    assert list(found["tasks"]) == ["x", "z"]
    assert list(found["families"]) == ["b"]
    assert all(list(task["samples"]) == ["b"] for task in found["tasks"].values())
    with pytest.raises(BenchmarkError, match="model"):
        pmpd_report.merged([record("m", "a", x=1), record("n", "a", y=1)])
    with pytest.raises(BenchmarkError, match="no prompt"):
        pmpd_report.merged([record("m", "a", x=0)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    story = "Once upon a time there was a cat who sat on the other side of the hill and ran to the barn. "
    stories = "\n<|endoftext|>\n".join(f"Number {index}. {story * 3}" for index in range(8))
    sums = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}. {story * 2}"} for i in range(9)]
    for name, text in (("stories", stories), ("arithmetic", "\n".join(map(json.dumps, sums)))):
        path = folder / TASKS[name].path
        path.parent.mkdir(parents=True)
        path.write_bytes(lzma.compress(text.encode()))
    return folder


def test_from_measurement_to_tables(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    model = str(tiny_taper(tmp_path / "tiny.taper", max_bits=4))
    given = [
        "--policy",
        "phase=phase:3/2",
        "--policy",
        "uniform=fixed:2",
        "--policy",
        "fixed:4",
        "--only-given",
    ]
    common = [model, "--data", str(data), *given]
    found, timed, picture = (str(tmp_path / name) for name in ("q.json", "s.json", "p.png"))

    def run(script: object, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        script.main()  # type: ignore[attr-defined]
        return capsys.readouterr().out.splitlines()

    last = run(quality, *common, "--tasks", "stories,arithmetic", "--prompts", "3", "--out", found)[-1]
    means = json.loads(last)["tasks"]
    # fixed:4 is all planes of this model, which is there already.
    assert list(means["stories"]) == ["fixed:{top}", "phase:3/2", "fixed:2"]
    assert means["stories"]["fixed:{top}"]["kl"] == pytest.approx(0, abs=1e-12)
    assert means["stories"]["fixed:{top}"]["rouge_full"] == 1
    assert means["stories"]["fixed:2"]["kl"] > 0
    assert "rouge_full" not in means["arithmetic"]["fixed:2"]
    run(speed, *common, "--rounds", "5", "--out", timed)
    lines = run(pmpd_report, found, "--speed", timed, "--plot", picture)
    record = json.loads(lines[-1])
    first = lines.index("## stories")
    rows = [line for line in lines[first : lines.index("## arithmetic")] if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert {row.count("|") for row in rows} == {12}
    overview = [line for line in lines[: lines.index("## stories")] if line.startswith("|")]
    assert len(overview) == 2 + 3
    assert {row.count("|") for row in overview} == {9}
    label = "prompt at 3, not 2; decode at 2"
    assert list(record["comparisons"]["stories"]) == [label]
    value, low, high = record["comparisons"]["stories"][label]["nll"]
    assert low <= value <= high
    assert value == pytest.approx(means["stories"]["phase:3/2"]["nll"] - means["stories"]["fixed:2"]["nll"])
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
