"""The measurements of exact mode: what counts as a mismatch, and agreement of two rows of logits."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import exact
import numpy as np
import pytest

import taper
from taper.engine import SamplingParams


@pytest.fixture(scope="module")
def llm():
    return taper.load()


def test_generations_of_every_policy_and_sampling_are_compared(llm):
    prompts = {"one": [[5, 6, 7]], "other": [[8, 9]]}
    tallies = defaultdict(exact.Tally)
    cases = len(exact.policies(llm)) * len(exact.SAMPLINGS)
    exact.measure_mismatches(llm, prompts, range(cases), 4, tallies)
    assert (tallies["all"].generations, tallies["all"].mismatches) == (cases, 0)
    assert tallies["all"].tokens == 4 * cases
    assert set(exact.SAMPLINGS) < set(tallies)


def test_another_token_is_a_mismatch(llm):
    completion = llm.generate([5, 6], policy="exact", max_tokens=3, ignore_eos=True)
    other = dataclasses.replace(completion, token_ids=(*completion.token_ids[:-1], 0))
    tally = exact.Tally()
    assert tally.add(completion, completion)
    assert not tally.add(other, completion)
    assert (tally.generations, tally.mismatches) == (2, 1)


def test_agreement_is_all_of_equal_rows_and_none_of_disjoint_ones():
    row = np.array([0.0, 2.0, -1.0, -90.0], np.float32)
    sampling = SamplingParams(temperature=1.0)
    assert exact._agreement(row, row, sampling, 3, 0.4) == pytest.approx((1, 1, 1))
    one, other = (np.array(values, np.float32) for values in ([0, -99, 0, -99], [-99, 0, -99, 0]))
    assert exact._agreement(one, other, sampling, 3, 0.4)[::2] == pytest.approx((0, 0))
    assert exact._agreement(one, other, SamplingParams(), 3, 0.4) == (0, 0, 0)
