"""The decision: which reading, and clear refusals; memory against the process's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from taper.errors import DoesNotFitError, UsageError
from taper.evaluate.footprint import footprint, measure_surplus
from taper.evaluate.recommend import Choice, Limits, recommend
from taper.formats.container import TaperFile
from taper.models import Decoder
from taper.testing.tiny import tiny_taper


def choice(bits: float, peak: int, loss: float | None = None, kl: float = 0.0) -> Choice:
    card = None if loss is None else {"increase_frac": loss, "kl_mean": kl}
    return Choice(bits, peak, peak, card)


MEASURED = [
    choice(4, 400, 0.01, 0.02),
    choice(2, 200, 0.30, 0.3),
    choice(8, 800, -0.001, 0.001),
    choice(3, 300, 0.05, 0.07),
]
UNMEASURED = [choice(2, 200), choice(4, 400)]


@pytest.mark.parametrize(
    ("limits", "bits"),
    [
        (Limits(memory_bytes=399), 3),
        (Limits(memory_bytes=400), 4),
        (Limits(loss_frac=0.01), 4),
        (Limits(loss_frac=0.0099), 8),
        (Limits(loss_frac=0.5, kl=0.07), 3),
        (Limits(memory_bytes=900, loss_frac=0.06), 3),
        (Limits(memory_bytes=10_000), 8),
        (Limits(), None),
    ],
)
def test_the_smallest_good_one_or_the_largest_that_fits(limits: Limits, bits: int | None) -> None:
    found = recommend(MEASURED, limits)
    assert (None if found is None else found.bits) == bits


def test_without_a_card_memory_alone_decides() -> None:
    found = recommend(UNMEASURED, Limits(memory_bytes=450))
    assert found is not None
    assert found.bits == 4
    with pytest.raises(UsageError, match="no quality card"):
        recommend(UNMEASURED, Limits(loss_frac=0.1))


def test_a_reading_that_was_not_measured_is_not_promised() -> None:
    choices = [*MEASURED[1:2], choice(3, 300)]
    with pytest.raises(DoesNotFitError, match=r"2 bits lose \+30\.00%"):
        recommend(choices, Limits(loss_frac=0.1))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(memory_bytes=100), "nothing fits 100 bytes: 2 bits need 200"),
        (Limits(loss_frac=-0.5), r"no width is within the loss asked for: 8 bits lose -0\.10%"),
        (
            Limits(memory_bytes=300, loss_frac=0.02),
            r"loses too much: 3 bits lose \+5\.00%.*; 4 bits would .* 400",
        ),
    ],
)
def test_nothing_fits(limits: Limits, message: str) -> None:
    with pytest.raises(DoesNotFitError, match=message):
        recommend(MEASURED, limits)


def test_footprint_is_weights_cache_and_surplus(tmp_path: Path) -> None:
    path = tiny_taper(tmp_path / "t.taper", 2, 4)
    decoder = Decoder.from_taper(TaperFile.open(path))
    found = footprint(decoder, 3, 100, 7)
    # Keys and values of 2 layers with 2 heads of 16, float16.
    assert (found.weight_bytes, found.kv_bytes) == (decoder.bytes_per_pass(3), 100 * 2 * 2 * 2 * 16 * 2)
    assert found.peak_bytes == found.weight_bytes + found.kv_bytes + 7
    with pytest.raises(DoesNotFitError):
        footprint(decoder, 3, 257, 0)
    # An interpreter with NumPy takes 25 MiB at the least; a model of 50 kB adds little.
    assert 2e7 < measure_surplus(path, decoder) < 3e8
