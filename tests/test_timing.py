from atlasvid_cli.timing import Timing, timed


def test_a_scaled_time_says_how_much_of_the_work_was_timed():
    scaled = Timing(3.0, 1.5, 6.0, 3).times(40)
    assert (scaled.seconds, scaled.low, scaled.high, scaled.fraction) == (120.0, 60.0, 240.0, 1 / 40)
    assert scaled.projected and not Timing(3.0, 1.5, 6.0, 3).projected
    assert scaled.times(2).fraction == 1 / 80


def test_median_and_spread_leave_the_warm_up_out(ticks):
    durations = iter((100.0, 3.0, 1.0, 2.0))
    found = timed(lambda: ticks(next(durations)), 3)
    assert (found.seconds, found.low, found.high, found.runs) == (2.0, 1.0, 3.0, 3)
