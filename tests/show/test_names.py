"""What the program calls its memory, as pictures tell it."""

import weakref

import numpy as np
import pytest

import ksmcore
from helpers.processes import run_python
from ksmcore._show.names import LEAVES_NO_TRACE, names_in

N_BYTES = 1 << 16
of_functions = pytest.mark.skipif(
    not LEAVES_NO_TRACE, reason="variables of functions are left alone"
)


def place(array):
    start = array.__array_interface__["data"][0]
    return start, start + array.nbytes


def fresh():
    return np.ones(N_BYTES, np.uint8)


class Model:
    pass


@of_functions
def test_variables_and_parts_of_them():
    model = Model()
    model.weights = {"first": fresh(), 7: [fresh(), (fresh(),)]}
    model.text = bytearray(N_BYTES)
    of_text = np.frombuffer(model.text, np.uint8)
    alone = fresh()
    ranges = [
        place(model.weights["first"]),
        place(model.weights[7][0]),
        place(model.weights[7][1][0]),
        place(of_text),
        place(alone),
    ]
    del of_text
    here = " in test_variables_and_parts_of_them()"
    assert names_in(ranges) == [
        f"model.weights['first']{here}",
        f"model.weights[7][0]{here}",
        f"model.weights[7][1][0]{here}",
        f"model.text{here}",
        f"alone{here}",
    ]


@of_functions
def test_several_in_one_place_the_largest_first():
    whole = np.ones(16 * N_BYTES, np.uint8)
    start, end = place(whole)
    first, second, third = (whole[i * N_BYTES : (i + 1) * N_BYTES - i * 4096] for i in range(3))
    fourth = whole[3 * N_BYTES : 4 * N_BYTES - 5 * 4096]
    parts = [whole[i * N_BYTES : (i + 1) * N_BYTES] for i in range(4, 6)]
    del whole
    here = " in test_several_in_one_place_the_largest_first()"
    (told,) = names_in([(start, end)])
    assert told == f"2 of parts{here}, first{here}, second{here} and 2 more"
    kept = [first, second, third, fourth, *parts]
    assert sum(map(len, kept)) == 6 * N_BYTES - 8 * 4096


@of_functions
def test_one_thing_of_two_names_is_told_once():
    first = fresh()
    again = first[100:]
    (told,) = names_in([place(first)])
    assert told == "first in test_one_thing_of_two_names_is_told_once()"
    assert len(again) == N_BYTES - 100


def test_where_nothing_leads():
    assert names_in([(1 << 40, (1 << 40) + 4096)]) == [""]
    assert names_in([]) == []


@of_functions
def test_what_leads_back_to_itself_and_what_raises():
    class Raises:
        @property
        def __array_interface__(self):
            raise RuntimeError

    around = {"raises": Raises()}
    around["around"] = around
    around["here"] = fresh()
    (told,) = names_in([place(around["here"])])
    assert told.startswith("around['here'] in ")


@of_functions
def test_nothing_is_kept_alive():
    """Not by the dict of its variables that a frame has in older releases, either."""

    def work():
        kept = fresh()
        gone = weakref.ref(kept)
        assert names_in([place(kept)]) == ["kept in work()"]
        del kept
        return gone()

    assert work() is None


def test_what_a_function_has_asked_for_stays_as_it_is():
    """Its `locals()`, and the namespace of `exec`, are its own."""
    array = fresh()
    mine = locals()
    n_before = len(mine)
    names_in([place(array)])
    assert len(mine) == n_before
    assert mine["array"] is array
    exec("x = 5; names_in([(0, 1)]); assert x == 5")


@of_functions
def test_a_frame_is_one_thing():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(N_BYTES), "b": np.arange(N_BYTES) * 1.5})
    told = names_in([place(frame["a"].to_numpy()), place(frame["b"].to_numpy())])
    assert told == ["frame in test_a_frame_is_one_thing()"] * 2


def test_parts_of_what_a_module_has():
    done = run_python(
        """
        import sys, types
        import numpy as np
        from ksmcore._show.names import names_in

        class Model:
            pass

        class Ends:
            @property
            def __array_interface__(self):
                raise SystemExit(3)

        def fresh():
            return np.ones(1 << 16, np.uint8)

        def place(array):
            start = array.__array_interface__["data"][0]
            return start, start + array.nbytes

        ends = Ends()
        sys.modules["strange"] = types.ModuleType("strange")
        del sys.modules["strange"].__name__
        model = Model()
        model.weights = {"first": fresh(), 7: [fresh(), (fresh(),)]}
        model.text = bytearray(1 << 16)
        model.around = model
        history = [np.ones(1 << 16, np.uint8) for _ in range(3)]
        again = history[1][100:]
        print(*names_in([
            place(model.weights["first"]), place(model.weights[7][0]),
            place(model.weights[7][1][0]), place(np.frombuffer(model.text, np.uint8)),
            place(history[1]),
        ]), sep="\\n")
        everything = min(map(place, history))[0], max(map(place, history))[1]
        print(names_in([everything])[0].partition("history")[0])
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "model.weights['first']",
        "model.weights[7][0]",
        "model.weights[7][1][0]",
        "model.text",
        "history[1]",
        "3 of ",
    ]


def test_modules_of_the_program_and_none_of_libraries(tmp_path):
    (tmp_path / "mine.py").write_text("import numpy as np\ntable = np.ones(1 << 20)\n")
    done = run_python(
        """
        import mine, numpy
        from ksmcore._show.names import LEAVES_NO_TRACE, names_in
        numpy.hidden = numpy.ones(1 << 20)
        globally = numpy.ones(1 << 20)

        def place(array):
            start = array.__array_interface__["data"][0]
            return start, start + array.nbytes

        print(names_in([place(mine.table), place(numpy.hidden), place(globally)]))
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert (done.stdout, done.stderr) == ("['mine.table', '', 'globally']\n", "")


class TestRegions:
    def test_a_name_and_who_registered_it(self, engine):
        array = np.ones(1 << 20)
        region = engine.register(array, name="weights")
        assert region.name == "weights"
        assert region.registered_at.startswith(f"{__file__}:")
        assert "'weights', " in repr(region)
        report = ksmcore.html_report(engine)
        assert "<b>weights</b>" in report
        if LEAVES_NO_TRACE:
            assert "which is array in test_a_name_and_who_registered_it()" in report
        assert "registered at test_names.py:" in report

    def test_all_parts_of_an_object_have_it(self, engine):
        area = engine.register({"a": np.ones(1 << 20), "b": np.ones(1 << 19)}, name="both")
        assert [region.name for region in area.regions] == ["both", "both"]
        assert "both at 0x" in area._repr_html_()

    def test_that_of_an_area(self, engine):
        with engine.area() as area:
            assert area.register(np.ones(1 << 20), name="mine").name == "mine"

    def test_none(self, engine):
        region = engine.register(np.ones(1 << 20))
        assert region.name is None

    def test_no_text(self, engine):
        with pytest.raises(TypeError, match="name must be text, not int"):
            engine.register(np.ones(1 << 20), name=7)
        assert engine.stats().regions == 0
        with pytest.raises(TypeError, match="name must be text, not int"):
            engine.register(np.ones(1 << 20)).name = 7

    def test_by_dedup(self, engine):
        engine.dedup({"a": np.ones(1 << 20)}, np.ones(1 << 19))
        assert all(region.registered_at.startswith(__file__) for region in engine.regions)


@of_functions
def test_thousands_of_arrays_in_one_place_take_little_time():
    whole = np.ones(40_000 * 4096, np.uint8)
    start, end = place(whole)
    parts = {
        f"k{i}": [whole[j * 4096 : (j + 1) * 4096] for j in range(i, i + 900)]
        for i in range(0, 36_000, 900)
    }
    del whole
    (told,) = names_in([(start, end)])
    assert told.endswith(" of parts in test_thousands_of_arrays_in_one_place_take_little_time()")
    assert int(told.partition(" ")[0]) > 500
    assert len(parts) == 40
