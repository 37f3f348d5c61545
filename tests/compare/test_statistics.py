"""Intervals and the number of seeds, against simulated experiments and SciPy's own tests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdpipe.compare.statistics import interval, interval_with_images, seeds_needed, verdict

SOME_GAINS = [0.012, 0.004, 0.019, 0.008, 0.011]


def bounds(found: object) -> tuple[float, float]:
    assert found is not None
    assert found.low is not None and found.high is not None
    return found.low, found.high


def test_an_interval_for_several_arms_is_the_t_interval_at_the_level_of_bonferroni() -> None:
    expected = stats.ttest_1samp(SOME_GAINS, 0).confidence_interval(1 - 0.05 / 6)
    assert bounds(interval(SOME_GAINS, comparisons=6)) == pytest.approx(tuple(expected))
    assert bounds(interval(SOME_GAINS)) == pytest.approx(tuple(stats.ttest_1samp(SOME_GAINS, 0).confidence_interval()))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-0.2, 0.2), min_size=3, max_size=8), st.integers(2, 20))
def test_more_arms_make_wider_intervals_with_the_same_mean(gains: list[float], arms: int) -> None:
    one, all_of_them = interval(gains), interval(gains, arms)
    assert one is not None and all_of_them is not None
    assert one.mean == all_of_them.mean
    if one.low is not None:
        assert bounds(all_of_them)[0] < bounds(one)[0] and bounds(all_of_them)[1] > bounds(one)[1]


def test_with_images_that_all_agree_the_interval_is_that_of_the_seeds() -> None:
    # Each seed gains on a share of the images that is the same in every piece: no doubt about the images is left.
    rng = np.random.default_rng(0)
    differences = np.zeros((5, 200_000), dtype=np.int8)
    for row, gain in zip(differences, SOME_GAINS, strict=True):
        row[rng.choice(200_000, round(200_000 * gain), replace=False)] = 1
    low, high = bounds(interval_with_images(differences))
    expected_low, expected_high = bounds(interval(SOME_GAINS))
    assert low == pytest.approx(expected_low, abs=5e-4) and high == pytest.approx(expected_high, abs=5e-4)


def test_few_images_widen_the_interval_as_far_as_their_sampling_says() -> None:
    # All seeds differ on the same images, so that they agree to the last image and only the images are in doubt.
    rng = np.random.default_rng(1)
    row = rng.choice([-1, 0, 1], size=400, p=[0.1, 0.7, 0.2]).astype(np.int8)
    differences = np.stack([row, row, row])
    differences[0, 0] = 1 - abs(differences[0, 0])  # a spread that is not quite 0
    low, high = bounds(interval_with_images(differences))
    normal = 1.96 * row.std() / 400**0.5
    assert high - low == pytest.approx(2 * normal, rel=0.1)


def test_one_seed_has_no_interval() -> None:
    assert interval_with_images(np.ones((1, 10), dtype=np.int8)) is None


def test_so_many_seeds_find_a_gain_four_times_of_five() -> None:
    rng = np.random.default_rng(2)
    pilot = interval(list(0.01 * stats.zscore(rng.standard_normal(6), ddof=1)))
    assert pilot is not None
    number = seeds_needed(pilot, 0.008)
    assert number is not None
    for seeds, enough in ((number, True), (number - 2, False)):
        experiments = rng.normal(0.008, 0.01, (4000, seeds))
        found = (stats.ttest_1samp(experiments, 0, axis=1).confidence_interval().low > 0).mean()
        assert (found > 0.79) == enough, (seeds, found)


def test_of_an_interval_that_is_cut_no_number_of_seeds_follows() -> None:
    wide = interval([0.3, -0.3])
    assert wide is not None and (wide.low, wide.high) == (-1, 1)
    assert seeds_needed(wide, 0.01) is None and "needed" not in verdict(wide)


def test_no_evidence_says_how_many_seeds_there_should_be() -> None:
    assert "; seeds needed: 4 for a gain of 1 point, 8 for a gain of 0.5" in verdict(
        interval([0.004, -0.002, 0.003, -0.004, 0.005])
    )
    assert "needed" not in verdict(interval(SOME_GAINS))
