"""Many models over one backbone: each kept whole, as programs like them, and what they share once.

A network is trained on handwritten digits. Then one variant for each customer is made of it: the
same backbone, and a last layer that is trained for that customer's labels. Every variant is an
ordinary, complete set of arrays, as if it had been loaded from a file of its own. The layers that
training left alone are equal, page for page.

    python examples/model_variants.py [--size small|full]
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
from common import SEED, check, digest, mib, pss, run, say, say_saved, timed
from numpy.typing import NDArray
from sklearn.datasets import load_digits

import ksmcore

Weights = list[NDArray[np.float32]]
Vectors = NDArray[np.float32]
Labels = NDArray[np.int64]


# ---- a network in NumPy --------------------------------------------------------------------------


def new_network(rng: np.random.Generator, sizes: list[int]) -> Weights:
    return [
        (rng.standard_normal((n_in, n_out)) * np.sqrt(2 / n_in)).astype(np.float32)
        for n_in, n_out in itertools.pairwise(sizes)
    ]


def activations(weights: Weights, x: Vectors) -> list[Vectors]:
    """The input of each layer, and the output of the last."""
    found = [x]
    for layer in weights[:-1]:
        found.append(np.maximum(found[-1] @ layer, 0))
    found.append(found[-1] @ weights[-1])
    return found


def predict(weights: Weights, x: Vectors) -> Labels:
    return activations(weights, x)[-1].argmax(axis=1)


def train(weights: Weights, x: Vectors, labels: Labels, n_steps: int, first_layer: int = 0) -> None:
    """Gradient descent on the cross entropy, of the layers from first_layer on."""
    rng = np.random.default_rng(SEED)
    for _ in range(n_steps):
        batch = rng.integers(0, len(x), 128)
        inputs = activations(weights, x[batch])
        scores = np.exp(inputs[-1] - inputs[-1].max(axis=1, keepdims=True))
        slope = scores / scores.sum(axis=1, keepdims=True)
        slope[np.arange(len(batch)), labels[batch]] -= 1
        slope /= len(batch)
        for i in range(len(weights) - 1, first_layer - 1, -1):
            step = inputs[i].T @ slope
            slope = (slope @ weights[i].T) * (inputs[i] > 0)
            weights[i] -= 0.05 * step


# ---- variants ------------------------------------------------------------------------------------


def relabelled(labels: Labels, variant: int) -> Labels:
    """What a customer calls the digits: a permutation of its own."""
    return np.random.default_rng([SEED, variant]).permutation(10)[labels]


def new_variant(backbone: Weights, x: Vectors, labels: Labels, variant: int) -> Weights:
    """A whole copy of the network, in page-aligned memory; its last layer is trained anew."""
    weights = [ksmcore.array(layer) for layer in backbone]
    train(weights, x, relabelled(labels, variant), n_steps=60, first_layer=len(weights) - 1)
    return weights


def accuracy(weights: Weights, x: Vectors, labels: Labels) -> float:
    return float((predict(weights, x) == labels).mean())


def counter_example(backbone: Weights, x: Vectors, labels: Labels) -> None:
    """Variants of which all layers were trained on; only counted, not merged."""
    variants = []
    for variant in range(3):
        weights = [ksmcore.array(layer) for layer in backbone]
        train(weights, x, relabelled(labels, variant), n_steps=5)
        variants.append(weights)
    layers = [layer for weights in variants for layer in weights]
    estimate = ksmcore.estimate(*layers)
    total = sum(layer.nbytes for layer in layers)
    text = f"{mib(estimate.bytes_saved)} of {mib(total)} could be saved"
    say("Not so", f"after 5 steps that train all layers: {text}")
    say("Not so", "weights quantised or pruned for each variant by itself; adapters kept apart")


def example(full: bool) -> None:
    width, n_variants = (2048, 32) if full else (384, 12)
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    x = (digits.data[order] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int64)
    train_x, test_x, train_labels, test_labels = x[:1400], x[1400:], labels[:1400], labels[1400:]

    backbone = new_network(np.random.default_rng(SEED), [64, width, width, width, 10])
    with timed("training the backbone"):
        train(backbone, train_x, train_labels, n_steps=200)
    say("Backbone", f"{accuracy(backbone, test_x, test_labels):.1%} of unseen digits right")

    with timed(f"training the last layer of {n_variants} variants"):
        variants = [new_variant(backbone, train_x, train_labels, i) for i in range(n_variants)]
    n_bytes = sum(layer.nbytes for weights in variants for layer in weights)
    worst = min(
        accuracy(weights, test_x, relabelled(test_labels, i)) for i, weights in enumerate(variants)
    )
    check(worst > 0.7, f"a variant gets only {worst:.1%} right")
    say("Variants", f"{n_variants} of {mib(n_bytes / n_variants)}; the worst: {worst:.1%} right")

    wanted = [[digest(layer) for layer in weights] for weights in variants]
    answers = [predict(weights, test_x) for weights in variants]
    before = pss()
    with timed("merging"):
        report = ksmcore.dedup(*(layer for weights in variants for layer in weights))
    say("Merged", f"{report.pages_merged:,} pages")
    for weights, digests, answer in zip(variants, wanted, answers, strict=True):
        check([digest(layer) for layer in weights] == digests, "a weight is not what it was")
        check(np.array_equal(predict(weights, test_x), answer), "a prediction is not what it was")
    say("Check", "all weights by digest, and all predictions: the same")
    say_saved(before, pss(), at_least=n_bytes * (n_variants - 3) // n_variants)

    train(variants[0], train_x, relabelled(train_labels, 0), n_steps=20)
    check([digest(layer) for layer in variants[1]] == wanted[1], "training one changed another")
    say("Go on", "one variant was trained on, all its layers: the others are what they were")
    counter_example(backbone, train_x, train_labels)


if __name__ == "__main__":
    sys.exit(run(example, __doc__))
