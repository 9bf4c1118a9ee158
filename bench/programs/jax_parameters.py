"""JAX parameters, their average (EMA), a target network and Adam's moments, zero as yet."""

import sys

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    sys.exit(77)

WIDTH = 1024
keys = jax.random.split(jax.random.key(0), 24)
parameters = [jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for key in keys]
average = jax.tree.map(jnp.copy, parameters)
target = jax.tree.map(jnp.copy, parameters)
moments = [jax.tree.map(jnp.zeros_like, parameters) for _ in range(2)]


@jax.jit
def evaluate(layers, x):
    for layer in layers:
        x = jax.nn.gelu(x @ layer) * 1.5
    return jnp.abs(x).mean()


@jax.jit
def norm(layers):
    return sum(jnp.vdot(layer, layer) for layer in layers)


x = jax.random.normal(jax.random.key(1), (64, WIDTH))
total = 0.0
for _ in range(60):
    x = jnp.roll(x, 1, axis=1)
    total += sum(float(evaluate(layers, x)) for layers in (parameters, average, target))
    total += sum(float(norm(layers)) for layers in moments)
print(f"{total:.5f}")
