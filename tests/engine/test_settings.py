"""Settings: what is refused and with which text, and that each one does what it says."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

import ksmcore
from helpers.kernels_view import store_mappings
from helpers.memory import PAGE, random_pages
from ksmcore._engine.settings import FIXED, GUARDS, Settings
from ksmcore._kernel import procfs

NAMES = [field.name for field in fields(Settings)]


@pytest.fixture(params=["Settings", "Engine", "configure"])
def give(request, engine):
    """Each of the three places that take settings."""
    if request.param == "configure":
        return engine.configure
    return getattr(ksmcore, request.param)


class TestRefused:
    @pytest.mark.parametrize("call", ["Engine", "configure"])
    def test_unknown_name(self, engine, call):
        give = engine.configure if call == "configure" else ksmcore.Engine
        with pytest.raises(TypeError, match="unknown setting 'pages_to_scam'") as caught:
            give(pages_to_scam=1)
        assert all(name in str(caught.value) for name in NAMES)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("use_zero_pages", 1),
            ("use_zero_pages", None),
            ("use_zero_pages", "yes"),
            ("max_shared_pages", 1.5),
            ("max_shared_pages", True),
            ("max_shared_pages", "auto"),
            ("map_budget", None),
            ("map_budget", 0.5),
            ("map_budget", "all"),
            ("map_budget", False),
            ("smart_scan", "on"),
            ("run", True),
            ("run", "1"),
            ("pages_to_scan", 0.5),
            ("sleep_millisecs", None),
            ("max_pages_to_merge", "none"),
            ("target_scan_time", "soon"),
            ("target_scan_time", True),
            ("max_cpu", None),
            ("max_cpu", "70"),
            ("threads", 1.5),
            ("threads", "all"),
            ("threads", True),
        ],
    )
    def test_wrong_type(self, give, name, value):
        with pytest.raises(TypeError, match=f"{name} must be") as caught:
            give(**{name: value})
        assert repr(value) in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("max_shared_pages", -1), ("max_shared_pages", 2**62), ("map_budget", -1)],
    )
    def test_out_of_range(self, give, name, value):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 0"):
            give(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("pages_to_scan", 0, "a whole number of at least 1"),
            ("sleep_millisecs", -1, "a whole number of at least 0"),
            ("max_pages_to_merge", -1, "a whole number of at least 0"),
            ("run", 3, "0, 1 or 2"),
            ("threads", 0, "a whole number of at least 1"),
            ("target_scan_time", 0, "a number above 0 or None"),
            ("target_scan_time", float("inf"), "a number above 0 or None"),
            ("max_cpu", float("nan"), "a number above 0"),
            ("max_cpu", 101, "above 0 and at most 100 percent"),
        ],
    )
    def test_the_scanners_out_of_range(self, give, name, value, allowed):
        with pytest.raises(ValueError, match=f"{name} must be {allowed}"):
            give(**{name: value})

    def test_too_many_threads(self, give):
        with pytest.raises(ValueError, match="threads is at most 64, not 65"):
            give(threads=65)

    @pytest.mark.parametrize("value", [0, -1, 2**28 + 1])
    def test_hash_size_out_of_range(self, value):
        with pytest.raises(ValueError, match="rmap_hash_size"):
            Settings(rmap_hash_size=value)

    @pytest.mark.parametrize("value", [None, "64", 64.0, True])
    def test_hash_size_of_wrong_type(self, value):
        with pytest.raises(TypeError, match="rmap_hash_size"):
            ksmcore.Engine(rmap_hash_size=value)

    @pytest.mark.parametrize(
        ("name", "listed"),
        [
            ("checksum", ["jhash", "mmh3"]),
            ("order", ["digest", "content"]),
            ("guard", ["auto", "mprotect"]),
            ("dirty", ["auto", "pagemap", "checksum"]),
        ],
    )
    @pytest.mark.parametrize("value", ["", "something", "AUTO"])
    def test_a_backend_that_is_not_there(self, name, listed, value):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not to be had") as caught:
            ksmcore.Engine(**{name: value})
        assert all(repr(word) in str(caught.value) for word in listed)

    @pytest.mark.parametrize("name", ["checksum", "order", "guard", "dirty"])
    @pytest.mark.parametrize("value", [None, 1, b"jhash"])
    def test_a_backend_of_wrong_type(self, name, value):
        with pytest.raises(TypeError, match=name):
            ksmcore.Engine(**{name: value})

    @pytest.mark.parametrize("name", FIXED)
    def test_fixed(self, engine, name):
        value = getattr(Settings(), name)
        with pytest.raises(ValueError, match=f"{name} is fixed") as caught:
            engine.configure(**{name: value})
        text = str(caught.value)
        assert f"ksmcore.Engine({name}={value!r})" in text
        assert all(free in text for free in NAMES if free not in FIXED)

    def test_nothing_is_changed(self, engine):
        before = engine.settings
        with pytest.raises(ValueError, match="fixed"):
            engine.configure(use_zero_pages=False, order="content")
        with pytest.raises(TypeError):
            engine.configure(use_zero_pages=False, max_shared_pages="many")
        assert engine.settings == before
        a = engine.full(10 * PAGE, 0, np.uint8)
        assert engine.dedup(a).pages_zeroed == 10

    def test_frozen(self):
        with pytest.raises(FrozenInstanceError):
            Settings().use_zero_pages = False


class TestValues:
    def test_defaults(self, engine):
        assert engine.settings == Settings()
        assert engine.settings.use_zero_pages is True
        assert engine.settings.max_shared_pages is None
        assert engine.settings.map_budget == "auto"

    def test_as_dict(self):
        assert list(Settings().as_dict()) == NAMES
        assert Settings(**Settings(map_budget=7).as_dict()) == Settings(map_budget=7)

    def test_configure_gives_all(self, engine):
        settings = engine.configure(map_budget=100)
        assert settings is engine.settings
        assert settings == Settings(map_budget=100)
        assert engine.configure() == settings

    def test_module_function(self):
        before = ksmcore.default_engine().settings
        try:
            assert ksmcore.configure(max_shared_pages=5).max_shared_pages == 5
        finally:
            ksmcore.configure(max_shared_pages=before.max_shared_pages)

    def test_auto_is_told_in_the_stats(self, engine):
        there = [name for name in GUARDS if ksmcore.features()[name] is None]
        assert engine.stats().guard == there[0]
        tracking = ksmcore.features()["tracking"] is None
        assert engine.stats().dirty == ("pagemap" if tracking else "checksum")

    @pytest.mark.parametrize("size", [1, 64, 1000, 2**16])
    def test_hash_size(self, size):
        with ksmcore.Engine(rmap_hash_size=size) as engine:
            a = engine.full(200 * PAGE, 3, np.uint8)
            assert engine.dedup(a).pages_merged == 200
            engine._core.check()


class TestZeroPages:
    def test_off(self):
        with ksmcore.Engine(use_zero_pages=False) as engine:
            a = engine.full(20 * PAGE, 0, np.uint8)
            report = engine.dedup(a)
            assert (report.pages_zeroed, report.pages_merged) == (0, 20)
            assert engine.stats().ksm_zero_pages == 0
            assert not a.any()

    def test_on(self, engine):
        a = engine.full(20 * PAGE, 0, np.uint8)
        report = engine.dedup(a)
        assert (report.pages_zeroed, report.pages_merged) == (20, 0)
        assert engine.stats().ksm_zero_pages == 20
        assert not a.any()

    def test_switched_off_then_on(self, engine):
        engine.configure(use_zero_pages=False)
        a = engine.full(20 * PAGE, 1, np.uint8)
        a[0] = 2
        a[:] = 0
        assert engine.dedup(a).pages_zeroed == 0
        del a
        engine.configure(use_zero_pages=True)
        b = engine.full(20 * PAGE, 0, np.uint8)
        assert engine.dedup(b).pages_zeroed == 20

    def test_switched_off_leaves_what_was_given_back(self, engine):
        a = engine.full(20 * PAGE, 0, np.uint8)
        engine.dedup(a)
        engine.configure(use_zero_pages=False)
        engine.dedup(a)
        assert engine.stats().ksm_zero_pages == 20
        assert not a.any()


class TestMaxSharedPages:
    def distinct(self, engine, rng, n):
        """Two equal arrays of n pages that are all different."""
        source = random_pages(rng, n)
        return source, [engine.array(source) for _ in range(2)]

    @pytest.mark.parametrize("limit", [0, 1, 10, 39])
    def test_bites_and_is_counted(self, engine, rng, limit):
        engine.configure(max_shared_pages=limit)
        source, arrays = self.distinct(engine, rng, 40)
        report = engine.dedup()
        stats = engine.stats()
        assert stats.store_pages == stats.pages_shared == limit
        assert report.pages_merged == 2 * limit
        assert report.skipped["max_shared_pages"] == 40 - limit
        assert all(np.array_equal(array, source) for array in arrays)

    def test_raised(self, engine, rng):
        engine.configure(max_shared_pages=10)
        _, arrays = self.distinct(engine, rng, 40)
        engine.dedup()
        engine.configure(max_shared_pages=None)
        assert engine.dedup(*arrays).pages_merged == 60
        assert engine.stats().pages_shared == 40

    def test_lowered_keeps_what_is_shared(self, engine, rng):
        _, arrays = self.distinct(engine, rng, 40)
        engine.dedup()
        engine.configure(max_shared_pages=5)
        engine.dedup(*arrays)
        assert engine.stats().pages_shared == 40
        # More sharers need no more shared pages.
        more = engine.array(arrays[0])
        assert engine.dedup().pages_merged == 40
        del more

    def test_one_is_enough_for_a_stretch(self, engine):
        engine.configure(max_shared_pages=1)
        array = engine.full(100 * PAGE, 7, np.uint8)
        assert engine.dedup(array).pages_merged == 100

    def test_exactly_enough(self, engine, rng):
        engine.configure(max_shared_pages=40)
        _, arrays = self.distinct(engine, rng, 40)
        assert engine.dedup(*arrays).pages_skipped == 0


@pytest.mark.usefixtures("collected")
class TestMapBudget:
    def store_maps(self):
        return [vma for vma in store_mappings() if vma.writable]

    def isolated(self, engine, rng, n):
        """n equal pages, each between two pages that equal nothing."""
        array = engine.array(random_pages(rng, 2 * n))
        array.reshape(-1, PAGE)[::2] = 7
        return array

    def test_none(self, engine, rng):
        engine.configure(map_budget=0)
        arrays = [engine.full(20 * PAGE, 7, np.uint8) for _ in range(2)]
        report = engine.dedup()
        assert report.pages_merged == 0
        assert report.skipped["map_budget"] > 0
        assert self.store_maps() == []
        assert engine.stats().pages_shared == 0
        assert engine.stats().maps_allowed == 0
        assert all((array == 7).all() for array in arrays)

    def test_none_for_scan(self, engine):
        engine.configure(map_budget=0)
        array = engine.full(20 * PAGE, 7, np.uint8)
        for _ in range(4):
            engine.scan()
        assert engine.stats().pages_merged == 0
        assert engine.stats().skipped["map_budget"] > 0
        assert self.store_maps() == []
        del array

    def test_zero_pages_need_none(self, engine):
        engine.configure(map_budget=0)
        array = engine.full(20 * PAGE, 0, np.uint8)
        assert engine.dedup(array).pages_zeroed == 20

    def test_kept(self, engine, rng):
        engine.configure(map_budget=40)
        array = self.isolated(engine, rng, 200)
        expected = array.copy()
        report = engine.dedup()
        assert 0 < report.pages_merged < 200
        assert report.skipped["map_budget"] > 0
        assert 2 * len(self.store_maps()) <= 40 + 2
        assert engine.stats().maps_used <= engine.stats().maps_allowed == 40
        assert np.array_equal(array, expected)

    def test_raised(self, engine, rng):
        engine.configure(map_budget=0)
        array = self.isolated(engine, rng, 100)
        engine.dedup()
        engine.configure(map_budget=1000)
        engine.dedup()
        assert engine.stats().pages_sharing + engine.stats().pages_shared == 100
        del array

    def test_lowered_unmaps_nothing(self, engine, rng):
        array = self.isolated(engine, rng, 50)
        engine.dedup()
        before = engine.stats().pages_sharing
        engine.configure(map_budget=0)
        engine.dedup()
        assert engine.stats().pages_sharing == before > 0
        del array

    def test_auto_is_at_most_half_of_what_is_free(self, engine):
        engine.scan()
        assert 0 < engine.stats().maps_allowed <= procfs.max_map_count() // 2


class TestSameResult:
    """Order and checksum change the way, not the result."""

    @pytest.mark.parametrize("passes", ["dedup", "scans"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"order": "content"},
            {"checksum": "mmh3"},
            {"order": "content", "checksum": "mmh3"},
            {"rmap_hash_size": 5000},
        ],
        ids=str,
    )
    def test_on_a_random_mixture(self, rng, settings, passes):
        # GIVEN pages drawn from few contents, some zero, some unique, twice over
        pool = rng.integers(0, 256, (60, PAGE), dtype=np.uint8)
        pool[0] = 0
        source = pool[rng.integers(0, 60, 600)]
        source[::17] = rng.integers(0, 256, (len(source[::17]), PAGE), dtype=np.uint8)

        def result(**settings):
            with ksmcore.Engine(**settings) as engine:
                arrays = [engine.array(source), engine.array(source[::-1].copy())]
                if passes == "dedup":
                    engine.dedup()
                else:
                    for _ in range(3):
                        engine.scan()
                engine._core.check()
                assert np.array_equal(arrays[0], source)
                assert np.array_equal(arrays[1], source[::-1])
                stats = engine.stats()
                return (
                    stats.pages_shared,
                    stats.pages_sharing,
                    stats.pages_unshared,
                    stats.pages_volatile,
                    stats.ksm_zero_pages,
                )

        # WHEN merged in both ways, THEN the result is the same
        default = result()
        assert default[1] > 0
        assert default[4] > 0
        assert result(**settings) == default
