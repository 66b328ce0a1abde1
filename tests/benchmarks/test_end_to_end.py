"""The comparison of speeds: what its programs print, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import groups
import pytest
from build import Peer
from common import BenchmarkError
from compare import BUILDERS
from gguf_models import SHAPES
from report import Sample, summaries, verdict_lines, verdicts
from sides import Programs, figure_name, last_json, read_batched, read_keys, read_taper


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    peer = Peer("package", "commit", "compiler", (), tmp_path)
    runners = dict.fromkeys((*groups.PEERS, "linear_half"), "python")
    return Programs(SHAPES["1.1b"], tmp_path, "python", peer, peer, tmp_path / "ik", runners, tmp_path)


def sample(number: int, name: str, value: float, others_frac: float = 0.0) -> Sample:
    return Sample("decode", number, name, value, 5e8, 2e10, others_frac)


@pytest.mark.parametrize(
    ("test", "name"),
    [
        ("tg64", "x"),
        ("pp512", "x pp"),
        ("tg32 @ d3072", "x @ d3072"),
        ("tg32 x8 @ d32", "x x8 @ d32"),
        ("vf5 @ d256", "x vf5 @ d256"),
    ],
)
def test_figures_are_named_after_what_differs(test: str, name: str):
    assert figure_name("x", test) == name


def test_unknown_tests_are_refused():
    with pytest.raises(BenchmarkError, match="unknown"):
        figure_name("x", "pg512,128")


def test_outputs_are_read():
    row = {"test": "tg64", "tokens_per_s": 40.0, "bytes_per_token": 5e8}
    figures = read_taper(f"\n{json.dumps({'rows': [row]})}\n", "taper 4 bits")
    assert figures["taper 4 bits"].value == 40.0
    assert figures["taper 4 bits"].bytes_per_token == 5e8
    batched = 'main: n_kv_max = 2048\n{"pl": 8, "speed_tg": 100.5, "speed": 50.0}\n'
    assert read_batched(batched, "Q4_0")["Q4_0 x8"].value == 100.5
    keys = {"decode": "a", "prefill": "b"}
    assert list(read_keys('{"decode": 1.5, "prefill": null}', "x", keys)) == ["a"]


@pytest.mark.parametrize("text", ["", "Traceback", "{"])
def test_output_without_json_is_an_error(text: str):
    with pytest.raises(BenchmarkError, match="no JSON"):
        last_json(text, "x")


SCRIPT_KEYS = (
    "ready_ms", "first_step_ms", "anonymous_mb", "overhead_percent", "thin_us", "first_token_s", "exit_s",
    "float16", "bfloat16",
)  # fmt: skip


class _Asked(dict[str, float]):
    """Holds every name, and remembers for which it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return True

    def __missing__(self, name: str) -> float:
        self.names.add(name)
        return 1.0

    def get(self, name: str, default: object = None) -> float:
        return self[name]


@pytest.mark.parametrize("name", BUILDERS)
def test_claims_name_figures_of_their_group(programs: Programs, name: str):
    """A misspelt figure would count as a side that did not run, and its claim be left out in silence."""
    group = BUILDERS[name](programs, 2)
    known = {side.name for side in group.sides}
    for side in group.sides:
        if "python" in side.command[0] and ".py" in side.command[1]:
            known |= set(side.read(json.dumps(dict.fromkeys(SCRIPT_KEYS, 1.0))))
    for claim in group.claims:
        figures, shares = _Asked(), _Asked()
        assert claim.value(figures, shares) is not None
        for asked in figures.names | shares.names:
            assert (
                asked.partition(" @")[0].partition(" x8")[0].partition(" vf")[0].removesuffix(" pp") in known
            )


def test_ratios_are_taken_within_a_round_against_the_best(programs: Programs):
    group = groups.decode(programs, 2)
    samples = []
    # The machine is twice as fast in round 2; medians of either side apart would mix the rounds.
    for number, speed in ((1, 1.0), (2, 2.0), (3, 1.0)):
        samples += [
            sample(number, "taper 4 bits", 40 * speed),
            sample(number, "llama.cpp Q4_K_M", 20 * speed),
            sample(number, "ik_llama.cpp Q4_K_M", 25 * speed),
        ]
    (share, best) = verdicts(group, samples)
    assert best.text == "decode at 4 bits against llama.cpp Q4_K_M or ik_llama.cpp Q4_K_M"
    assert (best.least, best.median, best.most) == (1.6, 1.6, 1.6)
    assert best.holds
    assert share.median == pytest.approx(100.0)  # 40 tok/s of 0.5 GB at 20 GB/s
    assert "| yes |" in verdict_lines([best])[-1]


def test_rounds_beside_other_work_are_left_out():
    samples = [sample(1, "a", 10), sample(2, "a", 30, others_frac=0.2), sample(3, "a", 20)]
    samples += [sample(1, "b", 1), sample(2, "b", 9), sample(3, "b", 2)]
    a, b = summaries("decode", samples)
    assert (a.median, a.least, a.most) == (15, 10, 20)
    assert (b.median, b.most) == (1.5, 2)  # b was alone, its round was not
    assert (a.num_left_out, a.num_rounds) == (b.num_left_out, b.num_rounds) == (1, 3)
    (only,) = summaries("decode", samples[1:2])  # better than nothing
    assert (only.median, only.num_left_out) == (30, 0)


def test_bounds_hold_in_their_direction():
    claim = groups.plain("load", "load", 100, "ms")
    group = groups.Group("decode", "ms", (), (claim,))
    (good,) = verdicts(group, [sample(1, "load", 90)])
    (bad,) = verdicts(group, [sample(1, "load", 110)])
    assert good.holds
    assert not bad.holds
