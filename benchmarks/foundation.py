"""What the hand-written reverse pass costs, and what it gives, against autodiff.

    python -m benchmarks.foundation [--json FILE]

"autodiff" is `jax.value_and_grad` of the same model's forward, jitted; for single layers, of the
`jax.nn` or plain `jax.numpy` form that one would write. Ratios are ours / theirs: below 1 is faster
or leaner.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import backhand as bh
from benchmarks.measure import Result, side_by_side
from benchmarks.report import machine, table, write


def classifier(*layers: bh.Layer) -> bh.Objective:
    return bh.objective(bh.chain(*layers), bh.losses.softmax_cross_entropy)


def labelled(rows: int, features: int, classes: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "inputs": jnp.asarray(rng.normal(size=(rows, features)), jnp.float32),
        "targets": jnp.asarray(rng.integers(0, classes, rows), jnp.int32),
    }


def manual(objective: bh.Objective, **given: Any) -> Callable[..., Any]:
    evaluate = bh.value_and_grad(objective)
    return lambda params, batch: evaluate(params, batch, **given)


def automatic(objective: bh.Objective, **given: Any) -> Callable[..., Any]:
    return lambda params, batch: jax.value_and_grad(objective)(params, batch, **given)


def against_autodiff(name: str, setting: str, objective: bh.Objective, batch: Any, **given: Any):
    params = objective.init(jax.random.key(0), batch)
    sides = manual(objective, **given), automatic(objective, **given)
    return side_by_side(name, setting, "autodiff", *sides, params, batch)


def gradients() -> Iterator[Result]:
    """Loss and gradient of whole models."""
    key = jax.random.key(1)
    small = classifier(bh.dense(64), bh.relu(), bh.dense(10))
    yield against_autodiff("MLP", "64-64-10, batch 32", small, labelled(32, 64, 10))
    wide = classifier(bh.dense(1024), bh.relu(), bh.dense(1024), bh.relu(), bh.dense(10))
    yield against_autodiff("MLP", "784-1024-1024-10, batch 256", wide, labelled(256, 784, 10))
    block = bh.skip(bh.chain(bh.layer_norm(), bh.dense(1024), bh.gelu(), bh.dense(256)))
    batch = labelled(1024, 256, 10)
    deep = classifier(bh.repeat(block, 8), bh.dense(10))
    yield against_autodiff("residual MLP", "8 x 256-1024-256, batch 1024", deep, batch)
    lean = classifier(bh.repeat(bh.checkpoint(block), 8), bh.dense(10))
    yield against_autodiff("the same, checkpointed", "8 x 256-1024-256, batch 1024", lean, batch)
    noisy = classifier(
        bh.repeat(bh.skip(bh.chain(bh.dense(256), bh.relu(), bh.dropout(0.1))), 8), bh.dense(10)
    )
    yield against_autodiff(
        "dropout MLP", "8 x 256, batch 4096", noisy, labelled(4096, 256, 10), key=key
    )
    normal = classifier(bh.dense(256), bh.batch_norm(), bh.relu(), bh.dense(10))
    yield against_autodiff(
        "batch norm MLP", "256-256-10, batch 4096", normal, labelled(4096, 256, 10)
    )
    yield against_autodiff(
        "softmax cross-entropy",
        "256-8192, batch 1024",
        classifier(bh.dense(8192)),
        labelled(1024, 256, 8192),
    )


def norms() -> Iterator[Result]:
    """The gradient and every example's norm, in one pass."""
    objective = classifier(bh.dense(256), bh.relu(), bh.dense(256), bh.relu(), bh.dense(10))
    batch = labelled(128, 256, 10)
    params = objective.init(jax.random.key(0), batch)
    collect = bh.value_and_collect(objective, grads=bh.gradients, norms=bh.square_norms)

    def both(params: Any, batch: Any) -> Any:
        value, collected = collect(params, batch)
        return value, collected["grads"], bh.per_example_norms(collected["norms"])

    def by_vmap(params: Any, batch: Any) -> Any:
        def one(example: Any) -> Any:
            return jax.grad(objective)(params, jax.tree.map(lambda leaf: leaf[None], example))

        each = jax.vmap(one)(batch)
        squares = [jnp.sum(jnp.square(g), tuple(range(1, g.ndim))) for g in jax.tree.leaves(each)]
        value, grads = jax.value_and_grad(objective)(params, batch)
        return value, grads, jnp.sqrt(sum(squares))

    setting = "256-256-256-10, batch 128"
    name = "gradient + per-example norms"
    yield side_by_side(name, setting, "plain gradient", both, automatic(objective), params, batch)
    yield side_by_side(name, setting, "vmap(grad)", both, by_vmap, params, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    arguments = parser.parse_args()
    results = []
    for group in (gradients, norms):
        for result in group():
            print(table([result]).splitlines()[-1], flush=True)
            results.append(result)
    print(f"\n{table(results)}\n\n{machine()}")
    if arguments.json:
        write(arguments.json, rows=results)


if __name__ == "__main__":
    main()
