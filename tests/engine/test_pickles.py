"""What is a number can be pickled and copied; what answers for memory refuses, in a sentence."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest

import ksmcore
import ksmcore.doctor
from helpers.memory import PAGE

KINDS = ("Stats", "PassReport", "RegionStats", "Estimate", "MemoryInfo", "Settings", "Diagnosis")


@pytest.fixture(params=KINDS)
def numbers(request, engine):
    """One of each kind, with numbers in it."""
    a = engine.empty((8, PAGE), np.uint8)
    a[:] = 3
    report = engine.dedup()
    return {
        "Stats": engine.stats,
        "PassReport": lambda: report,
        "RegionStats": lambda: engine.register(bytearray(4 * PAGE)).stats(),
        "Estimate": lambda: engine.estimate(a),
        "MemoryInfo": ksmcore.memory_info,
        "Settings": lambda: engine.settings,
        "Diagnosis": lambda: ksmcore.doctor.Diagnosis(
            (ksmcore.doctor.Check("name", "weak", "text", "remedy", {"n": 1}),)
        ),
    }[request.param]()


def assert_same(other, numbers):
    assert other == numbers
    assert type(other) is type(numbers)
    assert repr(other) == repr(numbers)
    assert other.as_dict() == numbers.as_dict()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numbers_can_be_pickled(numbers, protocol):
    assert_same(pickle.loads(pickle.dumps(numbers, protocol)), numbers)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_numbers_can_be_copied(numbers, copied):
    assert_same(copied(numbers), numbers)


def test_numbers_become_dicts(numbers):
    found = dataclasses.asdict(numbers)
    own = {field.name for field in dataclasses.fields(numbers)}
    assert set(found) == own
    written = json.loads(json.dumps(found))
    told = json.loads(json.dumps(numbers.as_dict()))
    assert written == {name: told[name] for name in own}
    assert dataclasses.astuple(numbers)


def test_copies_stay_frozen(engine):
    report = engine.scan()
    for one in (report, copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.pages_merged = 1
        for change in (
            lambda counts: counts.update(changed=1),
            lambda counts: counts.pop("changed"),
            lambda counts: counts.clear(),
            lambda counts: counts.setdefault("other", 1),
            lambda counts: counts.popitem(),
            lambda counts: counts.__setitem__("changed", 1),
            lambda counts: counts.__delitem__("changed"),
            lambda counts: counts.__ior__({"changed": 1}),
        ):
            with pytest.raises(TypeError, match="cannot be changed"):
                change(one.skipped)
        assert one.skipped["changed"] == 0


def test_a_mapping_that_is_given_is_not_kept():
    given = {"changed": 1}
    numbers = [0] * 6
    report = ksmcore.PassReport(*numbers, skipped=given, seconds=1.0)
    given["changed"] = 2
    assert report.skipped == {"changed": 1}


def test_the_history_can_be_pickled_and_copied(engine):
    a = engine.empty((8, PAGE), np.uint8)
    a[:] = 3
    engine.dedup()
    for other in (pickle.loads(pickle.dumps(engine.history)), copy.deepcopy(engine.history)):
        assert list(other) == list(engine.history)
        assert other.as_dict() == engine.history.as_dict()
        length = len(engine.history)
        other.add(other[-1]._replace(seconds=1e9, bytes_saved=1))
        assert len(engine.history) == length


@pytest.mark.parametrize("kind", ["Engine", "Region", "Area"])
@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, lambda one: copy.deepcopy({"in": [one]})])
def test_what_answers_for_memory_refuses(engine, kind, use):
    area = engine.area()
    region = area.register(bytearray(4 * PAGE))
    made = {"Engine": engine, "Region": region, "Area": area}[kind]
    with pytest.raises(TypeError, match=f"a ksmcore {kind} cannot be pickled or copied: "):
        use(made)
    assert not made.closed
    area.close()
