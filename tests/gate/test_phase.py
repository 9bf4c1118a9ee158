"""How far into a page a buffer begins, and what is told of two that differ in it."""

import warnings

import pytest

from ksmcore._gate import phase


def test_phase_advice_names_both_phases_and_the_way_out():
    text = phase.phase_advice(8_000_000, 16, 1856)
    assert "8,000,000 bytes" in text
    assert "begins 16 bytes into a page" in text
    assert "1856 bytes" in text
    assert "ksmcore.empty" in text
    assert "ksmcore.rows(" in text


def test_phase_warning_is_a_user_warning():
    assert issubclass(phase.PhaseWarning, UserWarning)
    with pytest.warns(phase.PhaseWarning, match="share pages only"):
        warnings.warn(phase.phase_advice(1, 2, 3), phase.PhaseWarning, stacklevel=1)
