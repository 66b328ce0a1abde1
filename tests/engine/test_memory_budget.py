"""One number of bytes for weights and KV caches: what fits, who is refused, what is released."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

import taper
from taper.engine import Engine, Request
from taper.engine.limits import Limits
from taper.engine.memory_budget import MemoryBudget, PressureGauge, memory_pressure
from taper.errors import DoesNotFitError, UsageError
from taper.formats.container import TaperFile
from taper.precision import Fixed, PhaseAware
from taper.testing.random_model import SHAPES, write_random_model
from taper.testing.tiny import tiny_hf_dir, tiny_taper

WEIGHTS = {
    bits: 1000 * bits for bits in range(2, 9)
}  # of conftest's FakeDecoder, which takes 10 bytes a token


class FakePlanes:
    """Writes down what it is told."""

    def __init__(self):
        self.calls = []

    def release_planes(self, above_bits):
        self.calls.append(("release", above_bits))

    def restore_planes(self, bits):
        self.calls.append(("restore", bits))


@pytest.fixture
def budgeted(says, tokenizer):
    """An engine whose weights and caches share a budget, and what its planes were told."""

    def build(total_bytes, gauge=None, output="abcdefgh"):
        planes = FakePlanes()
        limits = Limits(budget=MemoryBudget(WEIGHTS, planes, total_bytes, gauge))
        return Engine(says(output), tokenizer, limits=limits), planes.calls

    return build


def lowered(policy, num_tokens):
    """A request of `num_tokens` in all, which takes fewer bits where it must."""
    return Request("p", policy, max_tokens=num_tokens - 1, ignore_eos=True, allow_lower_bits=True)


@pytest.mark.parametrize(
    ("total_bytes", "bits"), [(8040, 8), (8039, 7), (7040, 7), (7039, 6), (2040, 2), (10**9, 8)]
)
def test_bits_are_the_widest_that_fits_beside_the_cache(budgeted, total_bytes, bits):
    engine, _ = budgeted(total_bytes)
    done = engine.generate(lowered(Fixed(8), 4))
    assert done.bits == (bits,) * 3
    assert done.ceilings == ((0, bits),)


def test_a_policy_below_the_ceiling_is_left_alone(budgeted):
    engine, _ = budgeted(5040)
    assert engine.generate(lowered(PhaseAware(8, 3), 4)).bits == (5, 3, 3)


def test_a_request_that_keeps_its_bits_is_refused_and_told_what_fits(budgeted):
    engine, _ = budgeted(5040)
    with pytest.raises(DoesNotFitError, match=r"8 bits take 0\.0 MB .* budget is 0\.0 MB") as error:
        engine.generate(Request("p", Fixed(8), max_tokens=3))
    assert "5 bits fit" in error.value.hint
    assert engine.model.passes == []
    assert engine.generate(Request("p", Fixed(5), max_tokens=3)).bits == (5, 5, 5)


def test_a_cache_that_fits_beside_no_width_is_refused(budgeted):
    engine, _ = budgeted(2039)
    with pytest.raises(DoesNotFitError, match="KV caches") as error:
        engine.generate(lowered(Fixed(2), 4))
    assert "98% of its tokens" in error.value.hint
    assert engine.generate(lowered(Fixed(8), 3)).bits == (2, 2)


def test_weights_that_do_not_fit_are_refused_when_the_model_is_loaded():
    with pytest.raises(DoesNotFitError, match="the weights at 2 bits"):
        MemoryBudget(WEIGHTS, FakePlanes(), 1999)


def test_a_second_request_takes_planes_from_the_first_and_gives_them_back(budgeted):
    engine, calls = budgeted(8060)
    with engine.stream(lowered(Fixed(8), 6)) as first:
        bits = [next(first).bits]
        with engine.stream(lowered(Fixed(8), 4)) as second:
            bits.append(next(second).bits)
            bits.append(next(first).bits)
        bits.append(next(first).bits)
    assert bits == [8, 7, 7, 8]
    assert calls == [("release", 7), ("restore", 8)]


def test_a_second_request_never_takes_planes_from_one_that_keeps_its_bits(budgeted):
    engine, _ = budgeted(8060)
    with engine.stream(Request("p", Fixed(8), max_tokens=5, ignore_eos=True)) as first:
        next(first)
        with pytest.raises(DoesNotFitError), engine.stream(lowered(Fixed(8), 4)) as second:
            next(second)
        assert next(first).bits == 8
    assert engine.generate(lowered(Fixed(8), 4)).bits == (8, 8, 8)


def test_a_fraction_counts_as_the_next_whole_width(budgeted):
    engine, _ = budgeted(4040)
    engine.model.has_sensitivity = True
    assert engine.generate(Request("p", Fixed(3.5), max_tokens=3)).bits == (3.5, 3.5, 3.5)
    with pytest.raises(DoesNotFitError):
        engine.generate(Request("p", Fixed(4.5), max_tokens=3))


# --- pressure ---


def test_pressure_lowers_one_bit_at_a_time_and_comes_back_slowly():
    now, pressure = [0.0], [50.0]
    gauge = PressureGauge(2, 4, lambda: pressure[0], lambda: now[0])
    seen = []
    for now_s, percent in ((0, 50), (1, 50), (2, 50), (4, 50), (6, 5), (8, 0.5), (18.9, 0), (21, 0), (36, 0)):
        now[0], pressure[0] = now_s, percent
        seen.append(gauge.bits())
    assert seen == [3, 3, 2, 2, 2, 2, 3, 3, 4]


def test_pressure_takes_bits_only_from_requests_that_allow_it(budgeted):
    engine, calls = budgeted(None, PressureGauge(2, 8, lambda: 99.0, lambda: 0.0))
    assert engine.generate(lowered(Fixed(8), 3)).bits == (7, 7)
    assert engine.generate(Request("p", Fixed(8), max_tokens=2, ignore_eos=True)).bits == (8, 8)
    assert calls == [("release", 7)]


@pytest.mark.parametrize(
    ("text", "percent"),
    [
        ("some avg10=12.50 avg60=3.10 avg300=0.90 total=1\nfull avg10=1.00 avg60=0 avg300=0 total=1\n", 12.5),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_pressure_is_the_systems_share_of_waiting_tasks(tmp_path, text, percent):
    path = tmp_path / "memory"
    if text is not None:
        path.write_text(text)
    assert memory_pressure(path) == percent


# --- real files ---


def resident_bytes(path: Path) -> int:
    """Of the maps of a file in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """2.4 MB a plane: many pages."""
    path = tmp_path_factory.mktemp("budget") / "larger.taper"
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_layers": 6}
    heads = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    config = taper.config.ModelConfig.from_dict(SHAPES["tiny"].to_dict() | sizes | heads)
    write_random_model(path, config)
    return path


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_released_planes_leave_memory_and_come_back_unchanged(larger):
    file = TaperFile.open(larger)
    planes = [plane for spec in file.matrices for plane in file.matrix(spec.name).planes]
    before = [plane.sum(dtype="int64") for plane in planes]
    held = resident_bytes(larger)
    file.release_planes(3)
    # Whole pages only: one may stay at the seam.
    gone = file.bytes_at(8) - file.bytes_at(3) - 2 * mmap.PAGESIZE
    assert held - resident_bytes(larger) >= gone > 0
    assert resident_bytes(larger) >= file.bytes_at(3) - file.unplaned_bytes - 2 * mmap.PAGESIZE
    file.restore_planes(8)
    assert [plane.sum(dtype="int64") for plane in planes] == before


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_a_growing_cache_pushes_planes_out_of_memory(larger):
    file = TaperFile.open(larger)
    plane = file.memory_at(8) - file.memory_at(7)
    llm = taper.load(larger)
    token_bytes = llm.engine.model.new_cache(1).token_bytes
    prompt = [index % 300 for index in range(plane // token_bytes)]
    options = {"policy": "fixed:8", "temperature": 0.0, "max_tokens": 2, "ignore_eos": True}
    plain = llm.generate(prompt, **options | {"policy": "fixed:7"})
    del llm
    llm = taper.load(larger, memory_budget=file.memory_at(8) + 4 * token_bytes)
    assert llm.generate(prompt[:2], **options, allow_lower_bits=True).bits == (8, 8)
    full = resident_bytes(larger)
    done = llm.generate(prompt, **options, allow_lower_bits=True)
    assert (done.bits, done.token_ids) == ((7, 7), plain.token_ids)
    assert full - resident_bytes(larger) >= plane - 2 * mmap.PAGESIZE > 0


def test_memory_counts_the_embedding_rows_that_every_look_up_reads(larger):
    file = TaperFile.open(larger)
    assert file.memory_at(8) == file.bytes_at(8)
    assert file.memory_at(3) - file.bytes_at(3) == 5 * file.tensor("embed.plane3").nbytes


def test_a_folder_takes_no_budget(tmp_path):
    with pytest.raises(UsageError, match="one width"):
        taper.load(tiny_hf_dir(tmp_path / "hf"), memory_budget=10**9)


def test_a_budget_holds_for_a_file_that_is_arriving(tmp_path):
    path = tiny_taper(tmp_path / "whole.taper")
    file = TaperFile.open(path)
    cut = tmp_path / "cut.taper"
    cut.write_bytes(path.read_bytes()[: file.bytes_at(6)])
    llm = taper.load(cut, progressive=True, memory_budget=file.memory_at(4) + 2_000)
    options = {"policy": "fixed:8", "max_tokens": 2, "ignore_eos": True, "allow_lower_bits": True}
    assert llm.generate([5, 6], **options).bits == (4, 4)
    llm.close()
