"""The table of counters: it has what the compiled code counts, and all that is told is from it."""

import ksmcore
from ksmcore._engine.counters import NUMBERS, SKIPPED, STAGES


def test_every_number_reason_and_stage_is_in_the_table(engine):
    stats = engine.stats()
    assert set(NUMBERS) == set(stats.as_dict())
    assert list(SKIPPED) == list(stats.skipped)
    assert list(STAGES) == list(stats.seconds)
    for name, meaning in NUMBERS.items():
        value = getattr(stats, name)
        assert meaning.sentence.endswith(".")
        assert (meaning.kind == "text") == (value is None or isinstance(value, str))
        assert bool(meaning.by) == isinstance(value, dict)


def test_help_tells_what_every_number_is():
    for name, meaning in NUMBERS.items():
        assert f"{name}: {meaning.sentence}\n" in f"{ksmcore.Stats.__doc__}\n"
