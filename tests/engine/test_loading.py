"""Answers from a file that is still arriving: the width follows the planes, the bytes are a cut file's."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest

import taper
from taper.engine import Engine, Request
from taper.engine.limits import Limits
from taper.engine.loading import ArrivingDecoder
from taper.errors import CorruptFileError, UsageError
from taper.formats.arrival import Arrival
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.precision import Fixed, PhaseAware, Progressive
from taper.testing.tiny import tiny_taper

PROMPT = (5, 6, 7, 8, 9, 10, 11, 12)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_taper(tmp_path_factory.mktemp("loading") / "whole.taper")


class Growing:
    """A copy of a file that grows by whole planes, and the decoder and engine over it."""

    def __init__(self, whole, path, bits):
        self.path, self._whole = path, whole
        self.grow(bits, take=False)
        arrival = Arrival(path)
        arrival.wait()
        self.decoder = ArrivingDecoder(arrival)
        self.engine = Engine(self.decoder, None, 3, limits=Limits(lambda: self.decoder.available_bits))

    def grow(self, bits, take=True):
        self.path.write_bytes(self._whole.read_bytes()[: TaperFile.open(self._whole).bytes_at(bits)])
        while take and self.decoder.advance():
            pass


@pytest.fixture
def growing(whole, tmp_path):
    return lambda bits: Growing(whole, tmp_path / "growing.taper", bits)


def greedy(policy, **options):
    return Request(PROMPT, policy, taper.SamplingParams(temperature=0), **options)


def decoder_at(path, bits):
    return Decoder.from_taper(TaperFile.open(path, max_bits=bits))


def test_runs_at_what_has_arrived_and_rises_with_it(growing):
    model = growing(2)
    bits = []
    with model.engine.stream(greedy(Fixed(8), max_tokens=6, ignore_eos=True)) as stream:
        for arrives in (None, 3, None, 7, 8, None):
            bits.append(next(stream).bits)
            if arrives:
                model.grow(arrives)
    assert bits == [2, 2, 3, 3, 7, 8]
    assert stream.completion().ceilings == ((0, 2), (2, 3), (4, 7), (5, 8))


def test_a_policy_below_what_has_arrived_is_left_alone(growing):
    model = growing(4)
    done = model.engine.generate(greedy(PhaseAware(8, 3), max_tokens=3, ignore_eos=True))
    assert done.bits == (4, 3, 3)
    assert done.ceilings == ((0, 4),)


def test_each_width_gives_the_bytes_of_a_cut_file(growing, whole):
    """By hand: a cut file of k planes for the passes that ran while k had arrived, over one cache."""
    model = growing(2)
    ours, theirs = model.decoder.new_cache(32), decoder_at(whole, 8).new_cache(32)
    for bits, tokens in ((2, PROMPT), (5, (20, 21)), (8, (22,))):
        model.grow(bits)
        ids = np.array(tokens, np.int32)
        got = model.decoder.forward(ids, ours, bits, "all")
        assert got.tobytes() == decoder_at(whole, bits).forward(ids, theirs, bits, "all").tobytes()
    assert ours.array.tobytes() == theirs.array.tobytes()


def test_widths_for_policies_are_those_of_the_whole_file(growing):
    decoder = growing(3).decoder
    assert (decoder.min_bits, decoder.max_bits, decoder.available_bits) == (2, 8, 3)


def test_an_audit_reads_at_what_is_there_and_is_refused_above(growing):
    """Refused before the answer, not after it."""
    model = growing(3)
    assert model.engine.generate(greedy(Fixed(2), max_tokens=2, audit=True)).audit.bits == 3
    with pytest.raises(UsageError, match="3 of 8 planes have arrived; 8 are needed"):
        model.engine.generate(greedy(Fixed(2), max_tokens=2, audit=True, audit_bits=8))
    model.grow(8)
    assert model.engine.generate(greedy(Fixed(2), max_tokens=2, audit=True)).audit.bits == 8


def test_refresh_writes_the_cache_that_the_missing_bits_would_have_written(growing, whole):
    model = growing(2)
    request = greedy(PhaseAware(8, 4), max_tokens=5, ignore_eos=True, refresh=True)
    with model.engine.stream(request) as stream:
        tokens = [next(stream).token_id, next(stream).token_id]
        model.grow(8)
        tokens += [step.token_id for step in stream]
    assert stream.completion().refreshes == ((2, 8),)
    decoder = decoder_at(whole, 8)
    cache = decoder.new_cache(32)
    decoder.forward(np.array([*PROMPT, tokens[0]], np.int32), cache, 8, "none")
    for last, expected in itertools.pairwise(tokens[1:]):
        logits = decoder.forward(np.array([last], np.int32), cache, 4, "last")
        assert int(logits[0].argmax()) == expected


@pytest.mark.parametrize(
    ("asked", "policy", "arrives", "refreshes"),
    [
        (False, Fixed(8), 8, ()),  # nobody asked for it
        (True, Fixed(8), 7, ()),  # what the prompt missed is not there yet
        (True, Fixed(2), 8, ()),  # the prompt missed nothing
        (True, Progressive(((6, 0), (3, 1))), 8, ((1, 6),)),  # the prompt's width, not the present one
    ],
)
def test_refresh_comes_once_and_only_where_it_mends_something(growing, asked, policy, arrives, refreshes):
    model = growing(2)
    with model.engine.stream(greedy(policy, max_tokens=4, ignore_eos=True, refresh=asked)) as stream:
        next(stream)
        model.grow(arrives)
        list(stream)
    assert stream.completion().refreshes == refreshes


def test_load_follows_a_growing_file_in_a_thread(whole, tmp_path):
    path = tmp_path / "model.taper"
    partial = tmp_path / "model.taper.part"
    data = whole.read_bytes()
    partial.write_bytes(data[: TaperFile.open(whole).bytes_at(2)])
    llm = taper.load(path, progressive=True)
    assert llm.arrival is not None
    assert llm.generate(PROMPT, policy="fixed:8", max_tokens=2, ignore_eos=True).bits == (2, 2)
    with partial.open("ab") as file:
        file.write(data[partial.stat().st_size :])
    thread = next(thread for thread in threading.enumerate() if thread.name == "taper-arrival")
    thread.join(timeout=30)
    assert llm.arrival.available_bits == 8
    assert llm.generate(PROMPT, policy="fixed:8", max_tokens=2, ignore_eos=True).bits == (8, 8)
    llm.close()


def test_close_ends_the_thread(growing):
    decoder = growing(2).decoder
    decoder.follow()
    thread = next(thread for thread in threading.enumerate() if thread.name == "taper-arrival")
    decoder.close()
    assert not thread.is_alive()


def test_a_process_ends_quietly_while_its_file_arrives(whole, tmp_path):
    path = tmp_path / "cut.taper"
    path.write_bytes(whole.read_bytes()[: TaperFile.open(whole).bytes_at(3)])
    code = (
        f"import taper; llm = taper.load({str(path)!r}, progressive=True); print(llm.arrival.available_bits)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_load_of_a_cached_file_is_a_plain_decoder(whole, monkeypatch):
    monkeypatch.setattr("taper.formats.arrival.is_cached", lambda file, begin, end: True)
    llm = taper.load(whole, progressive=True)
    assert llm.arrival is None
    done = llm.generate(PROMPT, policy="fixed:8", temperature=0.0, max_tokens=4)
    plain = taper.load(whole).generate(PROMPT, policy="fixed:8", temperature=0.0, max_tokens=4)
    assert (done.token_ids, done.ceilings) == (plain.token_ids, ())


def test_damage_stops_the_rise_and_is_said(whole, tmp_path):
    data = bytearray(whole.read_bytes())
    data[TaperFile.open(whole).bytes_at(5) + 100] ^= 1
    path = tmp_path / "damaged.taper"
    path.write_bytes(data)
    llm = taper.load(path, progressive=True, verify=True)
    assert llm.arrival is not None
    assert llm.arrival.problem == "the bytes of embed.plane5 do not match their checksum"
    assert llm.generate(PROMPT, policy="fixed:8", max_tokens=2, ignore_eos=True).bits == (5, 5)


def test_a_file_without_the_first_planes_is_refused(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("taper.formats.arrival.STALL_S", -1.0)
    path = tmp_path / "short.taper"
    path.write_bytes(whole.read_bytes()[: TaperFile.open(whole).bytes_at(1)])
    with pytest.raises(CorruptFileError, match="cut off"):
        taper.load(path, progressive=True)
