"""A replay buffer that keeps stacked observations whole, and does not pay for it.

An agent that learns from pictures sees the last four frames at once. The plain way to remember
what it saw is to keep, for each step, the four frames before it and the four after it. So each
frame is kept eight times, 64 KiB a step. Equal frames are equal pages, if each begins on a page:
that is what `ksmcore.rows` is for. The buffer stays the simple array that it was, to be read and
written anywhere.

The frames are those of the mountain car of gymnasium, drawn without a display.

    python examples/replay_buffer.py [--size small|full]
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Before pygame is imported: draw into memory, and greet nobody.
os.environ["SDL_VIDEODRIVER"] = "dummy"
os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"

import gymnasium
import numpy as np
from common import SEED, check, digest, mib, pss, run, say, say_saved, timed
from numpy.typing import NDArray

import ksmcore

SIDE = 84  # pixels
N_STACKED = 4
EPISODE_STEPS = 200
BATCH = 256

Frame = NDArray[np.uint8]


# ---- the simulation ----------------------------------------------------------------------------


def reduced(picture: Frame) -> Frame:
    """A picture of any size as SIDE x SIDE shades of grey, each the mean of a block of pixels."""
    edges = [np.arange(SIDE) * length // SIDE for length in picture.shape[:2]]
    grey = picture.sum(axis=2, dtype=np.uint16)
    sums = np.add.reduceat(grey, edges[0], axis=0, dtype=np.uint32)
    sums = np.add.reduceat(sums, edges[1], axis=1)
    heights, widths = (
        np.diff(edge, append=length) for edge, length in zip(edges, picture.shape[:2], strict=True)
    )
    return (sums // (3 * np.outer(heights, widths))).astype(np.uint8)


def play(episode: int) -> Iterator[tuple[int, float, Frame]]:
    """One episode: the action taken, the reward for it, and the frame after it.

    The first has no action. The car is pushed the way that it moves, and now and then any way.
    """
    env: Any = gymnasium.make("MountainCar-v0", render_mode="rgb_array")
    rng = np.random.default_rng([SEED, episode])
    state, _ = env.reset(seed=SEED + episode)
    yield -1, 0.0, reduced(env.render())
    done = False
    while not done:
        action = int(rng.integers(3)) if rng.random() < 0.2 else 2 * int(state[1] > 0)
        state, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        yield action, float(reward), reduced(env.render())
    env.close()


# ---- the buffer --------------------------------------------------------------------------------


class ReplayBuffer:
    """A ring of steps, each with all the pixels that were seen before and after it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.n_added = 0
        # Every frame on pages of its own: 84 x 84 bytes take two, the rest of the second is unused.
        frames = ksmcore.rows(capacity * 2 * N_STACKED, (SIDE, SIDE), np.uint8)
        # [step, before or after, which of the stack, y, x]: a view.
        self.seen = frames.reshape(capacity, 2, N_STACKED, SIDE, SIDE)
        self.actions = np.zeros(capacity, np.int64)
        self.rewards = np.zeros(capacity, np.float32)

    def add(self, before: list[Frame], action: int, reward: float, after: list[Frame]) -> int:
        slot = self.n_added % self.capacity
        self.seen[slot, 0] = before
        self.seen[slot, 1] = after
        self.actions[slot], self.rewards[slot] = action, reward
        self.n_added += 1
        return slot

    def sample(self, rng: np.random.Generator, n: int) -> tuple[NDArray[np.int64], Frame]:
        slots = rng.integers(0, min(self.n_added, self.capacity), n)
        return slots, self.seen[slots]


@dataclass
class Reference:
    """What each slot of the buffer has to hold: digests of the frames as they were drawn."""

    drawn: dict[int, list[list[bytes]]] = field(default_factory=dict)

    def check(self, slots: NDArray[np.int64] | range, seen: Frame, when: str) -> None:
        for slot, pair in zip(slots, seen, strict=True):
            found = [[digest(frame) for frame in stack] for stack in pair]
            check(found == self.drawn[int(slot)], f"{when}, step {slot} shows other frames")


def fill(buffer: ReplayBuffer, reference: Reference, n_steps: int, first_episode: int) -> int:
    """Play until n_steps were added; the number of episodes that it took."""
    n_wanted = buffer.n_added + n_steps
    episode = first_episode
    while buffer.n_added < n_wanted:
        stack: deque[Frame] = deque(maxlen=N_STACKED)
        digests: deque[bytes] = deque(maxlen=N_STACKED)
        for action, reward, frame in play(episode):
            if not stack:  # the first frame stands for those before it
                stack.extend([frame] * N_STACKED)
                digests.extend([digest(frame)] * N_STACKED)
                continue
            before, digests_before = list(stack), list(digests)
            stack.append(frame)
            digests.append(digest(frame))
            slot = buffer.add(before, action, reward, list(stack))
            reference.drawn[slot] = [digests_before, list(digests)]
            if buffer.n_added == n_wanted:
                break
        episode += 1
    return episode - first_episode


# ---- where it does not help --------------------------------------------------------------------


def counter_examples(buffer: ReplayBuffer) -> None:
    """The same steps, kept in other ways; only counted, not merged."""
    some = buffer.seen[: min(buffer.capacity, 500)]
    packed = ksmcore.array(np.ascontiguousarray(some))
    estimate = ksmcore.estimate(packed)
    text = f"{mib(estimate.bytes_saved)} of {mib(packed.nbytes)} could be saved"
    say("Not so", f"frames packed without a gap, at any offset in a page: {text}")

    rng = np.random.default_rng(SEED)
    noisy = ksmcore.rows(some.shape[0] * 2 * N_STACKED, (SIDE, SIDE), np.uint8)
    noisy[...] = some.reshape(noisy.shape) // 2 + rng.integers(0, 4, noisy.shape, np.uint8)
    estimate = ksmcore.estimate(noisy)
    text = f"{mib(estimate.bytes_saved)} of {mib(noisy.nbytes)} could be saved"
    say("Not so", f"noise of its own in each kept copy (augmentation before storing): {text}")
    say("Not so", "beyond some 2,000 steps, unless vm.max_map_count is raised (see skipped)")
    say("Not so", "a buffer that keeps each frame once, and stacks when sampling, needs no merging")


def example(full: bool) -> None:
    # Frames of one game have pages in common, here the ground: so each frame is a run of its own,
    # and takes two of the 65,530 mappings that a process may have, half of which are used.
    capacity = 2000 if full else 300
    buffer, reference = ReplayBuffer(capacity), Reference()
    with timed(f"playing and drawing {capacity:,} steps"):
        n_episodes = fill(buffer, reference, capacity, first_episode=0)
    say("Buffer", f"{capacity:,} steps of {n_episodes} episodes, {mib(buffer.seen.nbytes)}")

    before = pss()
    with timed("merging"):
        report = ksmcore.dedup(buffer.seen)
    say("Merged", f"{report.pages_merged:,} pages; left out: {sum(report.skipped.values()):,}")
    reference.check(range(capacity), buffer.seen, "after merging")
    say_saved(before, pss(), at_least=buffer.seen.nbytes // 2)

    rng = np.random.default_rng(SEED)
    started = time.perf_counter()
    for _ in range(10):
        reference.check(*buffer.sample(rng, BATCH), "in a sampled batch")
    each = (time.perf_counter() - started) / 10
    text = f"all steps, and 10 sampled batches of {BATCH} ({each * 1e3:.0f} ms each)"
    say("Check", f"{text}: all right")

    # The ring goes on: new steps take the place of the oldest, ordinary writes to shared pages.
    n_more = capacity // 10
    n_episodes += fill(buffer, reference, n_more, first_episode=n_episodes)
    reference.check(range(capacity), buffer.seen, f"after {n_more} further steps")
    # A background scanner (`ksmcore.start()`) would do this by itself.
    again = ksmcore.dedup(buffer.seen)
    reference.check(range(capacity), buffer.seen, "after merging again")
    text = f"the {n_more:,} oldest steps were overwritten and merged again"
    say("Ring", f"{text}: {again.pages_merged:,} pages, in {again.seconds:.2f} s")

    _, _, frame = next(play(0))
    _, _, same = next(play(0))
    check(digest(frame) == digest(same), "a replayed episode begins with another frame")
    counter_examples(buffer)


if __name__ == "__main__":
    sys.exit(run(example, __doc__))
