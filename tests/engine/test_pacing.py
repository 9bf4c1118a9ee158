"""Pacing: the advisor's arithmetic over a simulated clock and a simulated memory."""

import pytest

from ksmcore import Settings
from ksmcore._engine.pacing import (
    IDLE_SHARE,
    LONGEST_REST_SECONDS,
    LOOK_RESTS,
    Pacer,
    are_wanted,
)

OVERSLEEPING = 0.0002  # what a sleep takes longer than asked


class Simulated:
    """A scanner over `n_pages` pages, each of which takes so many seconds of a processor."""

    def __init__(self, settings, n_pages, page_seconds):
        self.settings = settings
        self.n_pages = n_pages
        self.page_seconds = page_seconds
        self.is_fruitful = False
        self.is_crowded = False
        self.pacer = Pacer()
        self.now = 1000.0
        self.cpu = 0.0

    def make_pass(self):
        """Returns (how long it took, processor seconds)."""
        began, cpu = self.now, self.cpu
        done = 0
        self.pacer.begin_pass(self.now)
        while done < self.n_pages:
            n = self.pacer.batch_pages(self.settings, self.n_pages)
            n = min(n, self.n_pages - done)
            done += n
            seconds = n * self.page_seconds
            self.now += seconds
            self.cpu += seconds
            rest = self.pacer.rest(
                self.settings,
                self.now,
                seconds,
                done / self.n_pages,
                was_fruitful=self.is_fruitful,
                is_crowded=self.is_crowded,
            )
            assert rest >= 0
            self.now += rest + OVERSLEEPING
        return self.now - began, self.cpu - cpu


@pytest.mark.parametrize("n_pages", [100_000, 400_000, 1_600_000])
@pytest.mark.parametrize("target", [1.0, 5.0, 200.0])
def test_a_pass_takes_the_target_whatever_the_size(n_pages, target):
    simulated = Simulated(Settings(target_scan_time=target), n_pages, 0.4e-6)
    for _ in range(3):
        seconds, _ = simulated.make_pass()
        assert seconds == pytest.approx(target, rel=0.05)


def test_the_target_holds_when_the_load_grows_fourfold_and_shrinks_again():
    simulated = Simulated(Settings(target_scan_time=2.0), 250_000, 0.5e-6)
    for n_pages in (250_000, 1_000_000, 1_000_000, 250_000):
        simulated.n_pages = n_pages
        seconds, _ = simulated.make_pass()
        assert seconds == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("max_cpu", [2, 10, 50, 90])
@pytest.mark.parametrize("page_seconds", [0.3e-6, 3e-6])
def test_the_cap_goes_before_the_target_and_is_used_up(max_cpu, page_seconds):
    settings = Settings(target_scan_time=0.001, max_cpu=max_cpu)
    simulated = Simulated(settings, 300_000, page_seconds)
    for n_pages in (300_000, 1_200_000, 300_000):
        simulated.n_pages = n_pages
        seconds, cpu = simulated.make_pass()
        assert cpu / seconds * 100 == pytest.approx(max_cpu, rel=0.2)


def test_by_hand_it_rests_as_told_or_as_the_cap_asks():
    settings = Settings(pages_to_scan=1000, sleep_millisecs=50)
    pacer = Pacer()
    pacer.begin_pass(0.0)
    assert pacer.batch_pages(settings, 10**9) == 1000
    assert pacer.rest(settings, 0.01, 0.01, 0.1, was_fruitful=True) == 0.05
    capped = Settings(pages_to_scan=1000, sleep_millisecs=50, max_cpu=1)
    pacer = Pacer()
    pacer.begin_pass(0.0)
    assert pacer.rest(capped, 0.01, 0.01, 0.1, was_fruitful=True) == pytest.approx(0.99)


def test_an_idle_pass_is_followed_by_a_long_rest_unless_there_is_a_target():
    settings = Settings()
    pacer = Pacer()
    pacer.begin_pass(0.0)
    pacer.rest(settings, 0.004, 0.004, 1.0, was_fruitful=True)
    assert pacer.idle_rest(settings) == pytest.approx(0.004 / IDLE_SHARE)
    assert pacer.idle_rest(Settings(target_scan_time=1)) == 0
    pacer.rest(settings, 10.0, 10.0, 1.0, was_fruitful=True)
    assert pacer.idle_rest(settings) == LONGEST_REST_SECONDS


def test_a_look_at_all_mappings_is_paid_for_by_rest():
    pacer = Pacer()
    assert pacer.rest_after_look(Settings(), 0.01) == pytest.approx(0.01 * LOOK_RESTS)
    assert pacer.rest_after_look(Settings(), 0.0) == 0
    assert pacer.rest_after_look(Settings(), 3600.0) == LONGEST_REST_SECONDS
    assert pacer.rest_after_look(Settings(sleep_millisecs=0), 1.0) == 0
    assert pacer.rest_after_look(Settings(target_scan_time=1), 1.0) == 0


def test_the_batch_stays_within_its_bounds():
    pacer = Pacer()
    settings = Settings(target_scan_time=10, pages_to_scan=5000)
    assert pacer.batch_pages(settings, 10) == 64
    assert pacer.batch_pages(settings, 1_000_000) == 2000
    assert pacer.batch_pages(settings, 100_000_000) == 5000


@pytest.mark.parametrize("sleep_millisecs", [0, 20])
def test_what_finds_nothing_costs_less_and_less_until_it_does(sleep_millisecs):
    settings = Settings(sleep_millisecs=sleep_millisecs, max_cpu=64)
    simulated = Simulated(settings, 250_000, 2e-6)

    def share():
        seconds, cpu = simulated.make_pass()
        return cpu / seconds

    shares = [share() for _ in range(8)]
    if sleep_millisecs == 0:
        assert shares == pytest.approx([0.64] * 8, rel=0.1)
        return
    # Rests of 20 ms keep the first one from all of its 64 %.
    assert shares[1:] == pytest.approx([0.27, 0.16, 0.08, 0.04, 0.02, 0.02, 0.02], rel=0.3)
    simulated.is_fruitful = True
    assert share() == pytest.approx(shares[0], rel=0.1)
    simulated.is_fruitful = False
    assert share() == pytest.approx(shares[1], rel=0.3)


def test_what_finds_nothing_costs_next_to_nothing_while_the_program_wants_all_processors():
    simulated = Simulated(Settings(sleep_millisecs=20, max_cpu=64), 250_000, 2e-6)

    def share():
        seconds, cpu = simulated.make_pass()
        return cpu / seconds

    simulated.is_fruitful = simulated.is_crowded = True
    assert share() == pytest.approx(0.27, rel=0.3)  # something is found: nothing changes
    simulated.is_fruitful = False
    shares = [share() for _ in range(8)]
    assert shares[-1] == pytest.approx(0.02 / 8, rel=0.2)
    simulated.is_crowded = False
    assert share() == pytest.approx(0.02, rel=0.2)


def test_all_processors_are_wanted_by_whoever_has_nearly_all_of_them():
    assert are_wanted(1.9, 1.0, 2)
    assert not are_wanted(1.7, 1.0, 2)
    assert are_wanted(0.95, 1.0, 1)
    # No time has gone by; or what the scanner has had is more than was told of the process.
    assert not are_wanted(0.0, 0.0, 1)
    assert not are_wanted(-0.001, 0.01, 1)
