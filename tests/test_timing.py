import pytest

from atlasvid_cli.timing import Timing, timed, together


def test_a_scaled_time_says_how_much_of_the_work_was_timed():
    scaled = Timing(3.0, 1.5, 6.0, 3).times(40)
    assert (scaled.seconds, scaled.low, scaled.high, scaled.fraction) == (120.0, 60.0, 240.0, 1 / 40)
    assert scaled.projected and not Timing(3.0, 1.5, 6.0, 3).projected
    assert scaled.times(2).fraction == 1 / 80


@pytest.mark.parametrize("fraction", [1.0, 0.1])
def test_a_time_scaled_down_is_projected_and_no_larger_part_of_it_was_timed(fraction):
    run = Timing(3.0, 1.5, 6.0, 3, fraction)
    less = run.times(2 / 3)
    assert less.seconds == pytest.approx(2.0) and less.fraction == fraction and less.projected
    assert less.times(1.5).projected and less.times(1, 1.0).projected
    assert together((less, Timing(1.0, 1.0, 1.0, 3))).projected
    assert run.times(1) == run


def test_median_and_spread_leave_the_warm_up_out(ticks):
    durations = iter((100.0, 3.0, 1.0, 2.0))
    found = timed(lambda: ticks(next(durations)), 3)
    assert (found.seconds, found.low, found.high, found.runs) == (2.0, 1.0, 3.0, 3)
