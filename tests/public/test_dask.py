"""`ksmcore.dask.KsmPlugin` on the real scheduler, with workers in processes of their own."""

import json
import pickle
import subprocess
import sys
import textwrap

import pytest

from helpers.processes import with_helpers

pytest.importorskip("distributed")

CHUNK_BYTES = 8 << 20
N_CHUNKS = 6

BEGIN = f"""
    import json, time
    import numpy as np
    from distributed import Client, LocalCluster
    import ksmcore
    from ksmcore.dask import KsmPlugin

    N_CHUNKS, CHUNK_BYTES = {N_CHUNKS}, {CHUNK_BYTES}

    def chunk(n):
        return np.random.default_rng(1).integers(0, 256, CHUNK_BYTES, np.uint8)

    def check(array):
        return bool((array == chunk(0)).all())

    def pss():
        import gc
        gc.collect()
        return ksmcore.memory_info().pss

    def held(client):
        # On each of the workers the same.
        return [
            client.submit(chunk, n, workers=[address], pure=False)
            for address in client.scheduler_info()["workers"]
            for n in range(N_CHUNKS)
        ]

    def until(condition):
        end = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)

    def metrics(client):
        workers = client.scheduler_info()["workers"].values()
        return [worker["metrics"].get("ksmcore") for worker in workers]
"""


def run(tmp_path, program):
    path = tmp_path / "program.py"
    code = textwrap.indent(textwrap.dedent(program), "    ")
    path.write_text(f"{textwrap.dedent(BEGIN)}\nif __name__ == '__main__':\n{code}")
    done = subprocess.run(
        [sys.executable, str(path)],
        env=with_helpers(DASK_DISTRIBUTED__ADMIN__TICK__LIMIT="1h"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_worker_merges_its_chunks_and_tells_of_it(tmp_path):
    found = run(
        tmp_path,
        """
        with LocalCluster(
            n_workers=2, processes=True, dashboard_address=None, memory_limit="1GiB"
        ) as cluster, Client(cluster) as client:
            futures = held(client)
            assert all(client.gather(client.map(check, futures)))
            plain = list(client.run(pss).values())
            del futures

            client.register_plugin(KsmPlugin(sleep_millisecs=1))
            futures = held(client)
            assert all(client.gather(client.map(check, futures)))
            least = (N_CHUNKS - 1) * CHUNK_BYTES
            until(lambda: min(s.bytes_saved for s in client.run(ksmcore.stats).values()) >= least)
            # Memory of tasks that have ended goes back by and by.
            merged = []

            def is_less():
                merged[:] = client.run(pss).values()
                return all(a - b > least - CHUNK_BYTES for a, b in zip(plain, merged))

            until(is_less)
            assert all(client.gather(client.map(check, futures, pure=False)))
            until(lambda: all(m and m["bytes_saved"] >= least for m in metrics(client)))

            # Dask's own figure, for the dashboard and for spilling, is the PSS.
            def is_pss():
                workers = client.scheduler_info()["workers"].values()
                told = [worker["metrics"]["memory"] for worker in workers]
                return all(a - b > least - 2 * CHUNK_BYTES for a, b in zip(plain, told))

            until(is_pss)
            shown = metrics(client)
            client.unregister_worker_plugin("ksmcore")
            scanning = client.run(lambda: ksmcore.default_engine().scanning)
            until(lambda: not any(metrics(client)))
            print(json.dumps([plain, merged, list(scanning.values()), shown]))
        """,
    )
    plain, merged, scanning, shown = found
    print("PSS in MiB:", *(f"{n / 2**20:.0f}" for n in plain + merged))
    assert len(plain) == len(merged) == len(shown) == 2
    assert scanning == [False, False]


def test_workers_in_threads_share_it_until_the_last_has_ended(tmp_path):
    found = run(
        tmp_path,
        """
        with LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster, Client(cluster) as client:
            client.register_plugin(KsmPlugin(counts="rss"))
            futures = held(client)
            until(lambda: ksmcore.stats().bytes_saved > CHUNK_BYTES)
            cluster.scale(1)
            until(lambda: len(client.scheduler_info()["workers"]) == 1)
            one = ksmcore.default_engine().scanning
            until(lambda: all(metrics(client)))
            del futures
        print(json.dumps([one, ksmcore.default_engine().scanning]))
        """,
    )
    assert found == [True, False]


def test_it_can_be_sent(tmp_path):
    from ksmcore.dask import KsmPlugin

    plugin = KsmPlugin(threshold_bytes=1 << 20, max_cpu=5)
    assert vars(pickle.loads(pickle.dumps(plugin))) == vars(plugin)


def test_what_is_wrong_is_told_before_it_is_sent():
    from ksmcore.dask import KsmPlugin

    with pytest.raises(TypeError, match="unknown setting 'interval'"):
        KsmPlugin(interval=5)
    with pytest.raises(ValueError, match="counts must be"):
        KsmPlugin(counts="uss")
