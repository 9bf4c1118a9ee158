"""What ksmcore does for a program that holds large, similar arrays.

Two pieces of ordinary numerical work fill some hundred megabytes:

- a wildfire spreads over a landscape, and every few steps a snapshot of the grids is kept. Away
  from the fire fronts one snapshot equals the one before;
- twelve models are tuned on top of one frozen backbone. Each holds all its weights, but only its
  head and a low-rank correction are its own.

Then equal pages are merged. Every array is checked against a digest taken before, written to, and
checked again: a write to one array must never be seen in another.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ksmcore
from ksmcore._engine.progress import load_bars
from ksmcore._kernel import smaps

Floats = NDArray[np.float32]

SEED = 2009
MOST_SCALE = 64
N_SNAPSHOTS = 40
STEPS_PER_SNAPSHOT = 8
N_MODELS = 12
# The first of the models lie in plain NumPy memory, as if loaded from checkpoint files.
N_PLAIN_MODELS = 7
N_BLOCKS = 5
N_CLASSES = 100
RANK = 8
MIB = 1 << 20


class DemoError(Exception):
    """Something that ksmcore promises did not hold."""


# ---- the wildfire ------------------------------------------------------------------------------


def spread_fire(fuel: Floats, heat: Floats, n_steps: int) -> None:
    """Let the fire burn and the heat flow, in place; each cell looks at its four neighbours."""
    flow = np.zeros_like(heat)
    for _ in range(n_steps):
        burnt = np.where(heat > 0.4, fuel * np.float32(0.3), np.float32(0))
        fuel -= burnt
        inner = heat[1:-1, 1:-1]
        around = heat[:-2, 1:-1] + heat[2:, 1:-1] + heat[1:-1, :-2] + heat[1:-1, 2:]
        flow[1:-1, 1:-1] = np.float32(0.15) * (around - np.float32(4) * inner)
        heat += flow
        heat += np.float32(3) * burnt
        heat *= np.float32(0.95)
        # What is barely warm is cold: the fire stays where it is, as it would in nature.
        heat[heat < 0.02] = 0


def simulate(side: int) -> Floats:
    """The history of a fire: snapshots of (fuel, heat), each of side x side cells."""
    rng = np.random.default_rng(SEED)
    fuel = rng.uniform(0.4, 1.0, (side, side)).astype(np.float32)
    heat = np.zeros_like(fuel)
    for row, column in rng.integers(side // 8, side - side // 8, (3, 2)):
        heat[row - 2 : row + 3, column - 2 : column + 3] = 2
    history: Floats = ksmcore.empty((N_SNAPSHOTS, 2, side, side), np.float32)
    for snapshot in history:
        spread_fire(fuel, heat, STEPS_PER_SNAPSHOT)
        snapshot[0], snapshot[1] = fuel, heat
    return history


# ---- the models --------------------------------------------------------------------------------


@dataclass
class Model:
    """One tuned model: the memory that it lies in, and its layers there by name."""

    memory: NDArray[np.uint8]
    layers: dict[str, Floats]


def make_backbone(width: int) -> dict[str, Floats]:
    """The frozen layers: an embedding, then blocks of an up and a down projection."""
    rng = np.random.default_rng(SEED + 1)
    shapes = {"embedding": (16 * width, width)}
    for block in range(N_BLOCKS):
        shapes[f"block{block}.up"] = (width, 4 * width)
        shapes[f"block{block}.down"] = (4 * width, width)
    return {
        name: rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
        for name, shape in shapes.items()
    }


def backbone_features(backbone: dict[str, Floats], tokens: NDArray[np.int64]) -> Floats:
    """Run tokens through the frozen layers; residual blocks, each scaled to unit size."""
    x = backbone["embedding"][tokens]
    for block in range(N_BLOCKS):
        x = x + np.maximum(x @ backbone[f"block{block}.up"], 0) @ backbone[f"block{block}.down"]
        x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True))
    return x


def tune(features: Floats, labels: NDArray[np.int64], seed: int) -> dict[str, Floats]:
    """Train a head and a low-rank pair by gradient descent: logits = (x + x A B) head."""
    rng = np.random.default_rng(seed)
    n, width = features.shape
    a = rng.standard_normal((width, RANK), np.float32) * np.float32(width**-0.5)
    b = np.zeros((RANK, width), np.float32)
    head = rng.standard_normal((width, N_CLASSES), np.float32) * np.float32(width**-0.5)
    rate = np.float32(0.5)
    for _ in range(10):
        low = features @ a
        hidden = features + low @ b
        logits = hidden @ head
        chance = np.exp(logits - logits.max(axis=1, keepdims=True))
        chance /= chance.sum(axis=1, keepdims=True)
        chance[np.arange(n), labels] -= 1
        slope = chance / np.float32(n)  # of the cross entropy by the logits
        hidden_slope = slope @ head.T
        head -= rate * (hidden.T @ slope)
        a_slope = features.T @ (hidden_slope @ b.T)
        b -= rate * (low.T @ hidden_slope)
        a -= rate * a_slope
    return {"lora.a": a, "lora.b": b, "head": head}


def plain_memory(n_bytes: int) -> NDArray[np.uint8]:
    """Ordinary NumPy memory, nothing that ksmcore had a hand in.

    Equal arrays share pages only if they begin at the same offset within a page, and NumPy promises
    none: so ask for one page more, and begin at the page boundary inside.
    """
    page = ksmcore.Engine.page_bytes
    roomy = np.empty(n_bytes + page, np.uint8)
    start = -roomy.ctypes.data % page
    return roomy[start : start + n_bytes]


def place(layers: dict[str, Floats], memory: NDArray[np.uint8]) -> Model:
    """Copy the layers into one stretch of memory, one after the other."""
    placed: dict[str, Floats] = {}
    used = 0
    for name, layer in layers.items():
        placed[name] = memory[used : used + layer.nbytes].view(np.float32).reshape(layer.shape)
        placed[name][...] = layer
        used += layer.nbytes
    return Model(memory, placed)


def tune_models(width: int) -> list[Model]:
    """Twelve models that share a backbone, each tuned on its own small data."""
    backbone = make_backbone(width)
    models: list[Model] = []
    for number in range(N_MODELS):
        rng = np.random.default_rng([SEED, number])
        tokens = rng.integers(0, 16 * width, 128)
        labels = rng.integers(0, N_CLASSES, 128)
        own = tune(backbone_features(backbone, tokens), labels, SEED + 100 + number)
        layers = {**backbone, **own}
        n_bytes = sum(layer.nbytes for layer in layers.values())
        n_bytes += -n_bytes % ksmcore.Engine.page_bytes
        plain = number < N_PLAIN_MODELS
        memory = plain_memory(n_bytes) if plain else ksmcore.empty(n_bytes, np.uint8)
        models.append(place(layers, memory))
    return models


# ---- what is held, and its check ---------------------------------------------------------------


def digest(array: NDArray[Any]) -> str:
    return hashlib.blake2b(array.reshape(-1).data, digest_size=16).hexdigest()


@dataclass
class Holdings:
    """All arrays of the program by name, with the digests taken before anything was merged."""

    arrays: dict[str, Floats]
    buffers: list[NDArray[Any]]
    digests: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = {name: digest(array) for name, array in self.arrays.items()}

    def check(self, when: str, changed: Sequence[str] = ()) -> None:
        """Every array has the bytes it began with, and those in `changed` have not."""
        for name, array in self.arrays.items():
            if (digest(array) == self.digests[name]) is (name in changed):
                what = "does not show what was written" if name in changed else "has other bytes"
                raise DemoError(f"{when}, {name} {what}")
        say("Check", f"{len(self.arrays)} arrays {when}: all right")


def hold(history: Floats, models: list[Model]) -> Holdings:
    arrays = {f"snapshot{number}": snapshot for number, snapshot in enumerate(history)}
    buffers: list[NDArray[Any]] = [history]
    for number, model in enumerate(models):
        arrays.update((f"model{number}.{name}", layer) for name, layer in model.layers.items())
        buffers.append(model.memory)
    return Holdings(arrays, buffers)


# ---- the demonstration -------------------------------------------------------------------------


def say(what: str, text: str) -> None:
    print(f"{what:<10}{text}", flush=True)


def mib(n_bytes: float) -> str:
    return f"{n_bytes / MIB:,.1f} MiB"


def build(scale: float) -> Holdings:
    started = time.perf_counter()
    # Grids of whole pages, even of 64 KiB ones: snapshots then begin at the same offset in a page.
    side = 128 * max(1, round(8 * scale**0.5))
    history = simulate(side)
    say("Wildfire", f"{N_SNAPSHOTS} snapshots of {side} x {side} cells, {mib(history.nbytes)}")
    models = tune_models(max(64, round(16 * scale**0.5) * 16))
    n_bytes = sum(layer.nbytes for model in models for layer in model.layers.values())
    say("Models", f"{N_MODELS} over one backbone, {N_PLAIN_MODELS} in plain NumPy, {mib(n_bytes)}")
    held = hold(history, models)
    say("", f"computed in {time.perf_counter() - started:.1f} s, digests of all arrays included")
    return held


def merge(held: Holdings, progress: bool) -> None:
    """Say what could be saved, save it, and see by the kernel's figures that it was."""
    estimate = ksmcore.estimate(*held.buffers)
    total = estimate.pages_present * estimate.page_bytes
    say("Estimate", f"{mib(estimate.bytes_saved)} of {mib(total)} could be saved")
    if progress:
        load_bars()
    before = memory()
    report = ksmcore.dedup(*held.buffers, progress=progress)
    say(
        "Merged",
        f"{report.pages_merged:,} pages, and {report.pages_zeroed:,} of zeros dropped, in "
        f"{report.seconds:.2f} s ({report.seconds / total * 2**30:.2f} s per GiB)",
    )
    # The check reads all pages, so that the figures after it are those of a program at work.
    held.check("after merging")
    after = memory()
    print(f"\n{'Memory':<10}{'before':>14}{'after':>14}{'saved':>14}")
    for name, was in before.items():
        now = after[name]
        print(f"{'  ' + name:<10}{mib(was):>14}{mib(now):>14}{mib(was - now):>14}")
    print("PSS counts a shared page once. RSS counts it once for every place that maps it, so only")
    print("dropped pages of zeros lower it. PSS is told without mapped files, such as libraries.")
    percent = report.bytes_saved / total
    print(f"Saved, by ksmcore's count: {mib(report.bytes_saved)}, {percent:.0%} of the arrays.\n")
    if report.bytes_saved <= 0:
        raise DemoError("nothing was saved")
    # The engine's records take some 3 % of what it saves, the interpreter a little.
    if before["PSS"] - after["PSS"] < 0.9 * report.bytes_saved - 4 * MIB:
        raise DemoError("the kernel does not show the memory as given back")


def memory() -> dict[str, int]:
    """Bytes that this process has by the kernel's account.

    PSS without mapped files: their share changes whenever another process with the same libraries
    starts or ends.
    """
    totals = smaps.smaps_rollup()
    return {"PSS": totals["Pss"] - totals.get("Pss_File", 0), "RSS": totals["Rss"]}


def write(held: Holdings) -> None:
    """Write to merged arrays, look at all the others, and write the old values back."""
    written = {
        "model0.embedding": held.arrays["model0.embedding"][::8],
        "model11.block1.up": held.arrays["model11.block1.up"][::8],
        f"snapshot{N_SNAPSHOTS // 2}": held.arrays[f"snapshot{N_SNAPSHOTS // 2}"][:, ::2],
    }
    originals = {name: rows.copy() for name, rows in written.items()}
    for rows in written.values():
        rows += 1
    n_bytes = sum(rows.nbytes for rows in written.values())
    say("Write", f"added 1 to {mib(n_bytes)} of {', '.join(written)}")
    held.check("after the write, those three changed", changed=list(written))
    broken = ksmcore.scan()
    say("Scan", f"{broken.cow_breaks:,} pages are no longer shared: each write made its own copy")
    for name, rows in written.items():
        rows[...] = originals[name]
    ksmcore.scan()  # sees that these pages changed
    again = ksmcore.scan()  # and now that they rest
    say("Restore", f"old values written back; two scans later {again.pages_merged:,} share again")
    held.check("after two scans")


def release(held: Holdings) -> None:
    """Make everything plain memory again."""
    say("Stats", repr(ksmcore.stats()).strip("<>").partition(": ")[2])
    for buffer in held.buffers:
        ksmcore.unregister(buffer)
    left = ksmcore.stats()
    held.check("unregistered")
    if left.pages_shared or left.pages_sharing:
        raise DemoError(f"nothing is registered, and yet {left.pages_shared} pages are shared")


def demonstrate(scale: float = 1.0, *, progress: bool = True) -> int:
    """Show all of it; returns the exit status, 1 if something that ksmcore promises did not hold.

    `scale`: size of the work, above 0 and at most MOST_SCALE; 1.0 takes some hundred megabytes.
    """
    started = time.perf_counter()
    try:
        held = build(scale)
        merge(held, progress=progress)
        write(held)
        release(held)
    except DemoError as error:
        print(f"demo: WRONG: {error}", file=sys.stderr)
        return 1
    say("Done", f"in {time.perf_counter() - started:.1f} s")
    return 0
