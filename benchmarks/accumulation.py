"""What exact accumulation costs, and how far other ways to accumulate are off.

    python -m benchmarks.accumulation [--json FILE]

Errors are of the gradient against float64 on the whole batch: the largest in a leaf, over its
largest element. Ratios are ours / theirs: below 1 is faster or leaner. Memory is what XLA allots
beside arguments and results.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from optax import microbatching

import backhand as bh
from benchmarks.measure import Result, in_turns, machine, side_by_side, table, write

Batch = dict[str, jax.Array]
SUM, MEAN = microbatching.AccumulationType.SUM, microbatching.AccumulationType.MEAN


def classifier(*layers: bh.Layer) -> bh.Objective:
    return bh.objective(bh.chain(*layers), bh.losses.softmax_cross_entropy)


def mlp(*widths: int) -> bh.Objective:
    hidden = [layer for width in widths[:-1] for layer in (bh.dense(width), bh.relu())]
    return classifier(*hidden, bh.dense(widths[-1]))


def masked(rows: int, features: int, classes: int, dtype: Any = jnp.float32) -> Batch:
    """Examples of which about half count, more towards the end, as when texts are packed."""
    rng = np.random.default_rng(0)
    counts = rng.uniform(size=rows) < np.linspace(0.1, 0.9, rows)[rng.permutation(rows)]
    return {
        "inputs": jnp.asarray(rng.normal(size=(rows, features)), dtype),
        "targets": jnp.asarray(rng.integers(0, classes, rows), jnp.int32),
        "weights": jnp.asarray(counts, jnp.float32),
    }


# Five ways to the gradient of one batch -----------------------------------------------------------


def whole_batch(objective: bh.Objective, micro_batches: int) -> Callable[..., Any]:
    return lambda params, batch: bh.value_and_grad(objective)(params, batch)[1]


def ours(objective: bh.Objective, micro_batches: int) -> Callable[..., Any]:
    accumulated = bh.accumulate(bh.value_and_grad(objective), micro_batches)
    return lambda params, batch: accumulated(params, batch)[1]


def columns(batch: Batch, micro_batches: int) -> Batch:
    """(K, B / K, ...) of every (B, ...), the same examples together as with `bh.accumulate`."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch
    )


def by_multi_steps(objective: bh.Objective, micro_batches: int) -> Callable[..., Any]:
    """`optax.MultiSteps`, as its documentation has it: gradients of mean losses, averaged."""
    rule = optax.MultiSteps(optax.identity(), micro_batches)

    def run(params: Any, batch: Batch) -> Any:
        parts = columns(batch, micro_batches)

        def one(state: Any, part: Batch) -> tuple[Any, None]:
            return rule.update(jax.grad(objective)(params, part), state, params)[1], None

        first = jax.tree.map(lambda x: x[:-1], parts)
        last = jax.tree.map(lambda x: x[-1], parts)
        state, _ = lax.scan(one, rule.init(params), first)
        return rule.update(jax.grad(objective)(params, last), state, params)[0]

    return run


def by_means(objective: bh.Objective, micro_batches: int) -> Callable[..., Any]:
    """`optax.microbatching`, of the mean loss that one would train a whole batch with."""

    def run(params: Any, batch: Batch) -> Any:
        size = len(batch["targets"]) // micro_batches
        return microbatching.microbatch(jax.grad(objective), 1, size, MEAN)(params, batch)

    return run


def by_sums(objective: bh.Objective, micro_batches: int) -> Callable[..., Any]:
    """`optax.microbatching` at its best: of sums and weights, written for the purpose."""

    def total(params: Any, batch: Batch) -> tuple[Any, Any]:
        terms = objective.forward(params, batch)[0]
        return terms.total, terms.weight

    def run(params: Any, batch: Batch) -> Any:
        size = len(batch["targets"]) // micro_batches
        sums = microbatching.microbatch(jax.grad(total, has_aux=True), 1, size, SUM)
        grads, weight = sums(params, batch)
        return jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)

    return run


OTHERS = {
    "whole batch": whole_batch,
    "optax.MultiSteps": by_multi_steps,
    "optax.microbatching, means": by_means,
    "optax.microbatching, sums": by_sums,
}


def error(grads: Any, truth: Any) -> float:
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(truth), strict=True)
    return max(float(np.abs(np.asarray(g, float) - t).max() / np.abs(t).max()) for g, t in pairs)


def in_float64(objective: bh.Objective, params: Any, batch: Batch) -> Any:
    """The gradient of the whole batch, of the very numbers that the others are given."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: np.asarray(x, np.int32 if x.dtype == jnp.int32 else np.float64),
            (params, batch),
        )
        return jax.tree.map(np.asarray, jax.jit(jax.grad(objective))(*wide))


def exactness() -> Iterator[Result]:
    """The same masked batch, every way; in float32, and in bfloat16 at 512 micro-batches."""
    low = jnp.bfloat16
    settings: list[tuple[str, bh.Objective, int, Batch, Any]] = [
        ("784-256-10, batch 1024", mlp(256, 10), 16, masked(1024, 784, 10), jnp.float32),
        ("bfloat16, 64-64-10, batch 1024", mlp(64, 10), 512, masked(1024, 64, 10, low), low),
    ]
    for setting, objective, micro_batches, batch, dtype in settings:
        params = jax.tree.map(
            lambda p, dtype=dtype: p.astype(dtype), objective.init(jax.random.key(0), batch)
        )
        truth = in_float64(objective, params, batch)
        mine = ours(objective, micro_batches)
        own = error(jax.jit(mine)(params, batch), truth)
        for name, make in OTHERS.items():
            other = make(objective, micro_batches)
            place = f"{setting}, K = {micro_batches}"
            result = side_by_side(
                "bh.accumulate", place, name, mine, other, params, batch, samples=7
            )
            errors = own, error(jax.jit(other)(params, batch), truth)
            yield dataclasses.replace(result, error=errors)


# Cost ---------------------------------------------------------------------------------------------


def models() -> Iterator[tuple[str, bh.Objective, int, Batch]]:
    """Models with the size of a micro-batch, and a masked batch of 8 of them."""
    yield "64-64-10, 8 x 32", mlp(64, 10), 32, masked(256, 64, 10)
    yield "784-1024-1024-10, 8 x 32", mlp(1024, 1024, 10), 32, masked(256, 784, 10)
    yield "784-1024-1024-10, 8 x 256", mlp(1024, 1024, 10), 256, masked(2048, 784, 10)
    block = bh.skip(bh.chain(bh.layer_norm(), bh.dense(1024), bh.gelu(), bh.dense(256)))
    four = classifier(*[block] * 4, bh.dense(10))
    yield "4 x 256-1024-256, 8 x 128", four, 128, masked(1024, 256, 10)
    deep = classifier(bh.repeat(block, 4), bh.dense(10))
    yield "the same by repeat, 8 x 128", deep, 128, masked(1024, 256, 10)


def cost() -> Iterator[Result]:
    """8 micro-batches in one call, against 8 calls of the plain gradient of one."""
    for setting, objective, size, batch in models():
        params = objective.init(jax.random.key(0), batch)
        part = jax.tree.map(lambda x, size=size: x[:size], batch)
        evaluate = bh.value_and_grad(objective)
        accumulated = bh.accumulate(evaluate, 8)
        result = side_by_side(
            "bh.accumulate",
            setting,
            "8 plain gradients",
            lambda params, batch, _, run=accumulated: run(params, batch),
            lambda params, _, part, run=evaluate: run(params, part),
            params,
            batch,
            part,
        )
        one, each = result.milliseconds
        yield dataclasses.replace(
            result, milliseconds=(one, 8 * each), time_ratio=result.time_ratio / 8
        )


def step_memory(step: bh.training.TrainStep, state: bh.TrainState, batch: Batch) -> float:
    return step.jitted.lower(state, batch).compile().memory_analysis().temp_size_in_bytes / 1e6


def memory() -> Iterator[str]:
    """Temporary memory of a whole step against the number of micro-batches."""
    yield "| step with AdamW | gradient, MB | K = 1 | 2 | 8 | 32 | above K = 1, in gradients |"
    yield "|---|---|---|---|---|---|---|"
    for setting, objective, size, batch in models():
        params = objective.init(jax.random.key(0), batch)
        gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
        optimizer = optax.adamw(1e-3)
        state = bh.train_state(params, optimizer)
        used = []
        for micro_batches in (1, 2, 8, 32):
            data = masked(size * micro_batches, batch["inputs"].shape[1], 10)
            step = bh.train_step(objective, optimizer, accumulate=micro_batches)
            used.append(step_memory(step, state, data))
        figures = " | ".join(f"{megabytes:.2f}" for megabytes in (gradient, *used))
        more = (used[-1] - used[0]) / gradient
        yield f"| {setting.split(',')[0]}, {size} each | {figures} | **{more:.2f}** |"


# Steps --------------------------------------------------------------------------------------------


def many_steps(steps: int = 50) -> Iterator[Result]:
    """Steps in one call, against as many calls."""
    objective, optimizer = mlp(64, 10), optax.adamw(1e-3)
    batch = masked(32, 64, 10)
    batches = jax.tree.map(lambda x: jnp.stack([x] * steps), batch)
    params = objective.init(jax.random.key(0), batch)

    def runner(step: Callable[..., Any], data: Batch, calls: int) -> Callable[[], Any]:
        state = bh.train_state(params, optimizer)

        def run() -> Any:
            nonlocal state
            for _ in range(calls):
                state, metrics = step(state, data)
            return state.step, metrics

        run()
        return run

    together = bh.train_step(objective, optimizer, steps_per_call=steps)
    apart = bh.train_step(objective, optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def plain(state: Any, batch: Batch) -> tuple[Any, Any]:
        loss, grads = jax.value_and_grad(objective)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state), {"loss": loss}

    place = "64-64-10, batch 32, AdamW"
    once = runner(together, batches, 1)
    for against, other in ((f"{steps} calls", apart), (f"{steps} calls of plain JAX", plain)):
        times, ratio = in_turns(once, runner(other, batch, steps), samples=9)
        yield Result(f"{steps} steps in one call", place, against, times, ratio, (0, 0), 1.0)


def updates() -> Iterator[Result]:
    """Updating parameters while going back, against a gradient followed by its update."""
    layer = bh.chain(bh.dense(512), bh.relu())
    batch = masked(32, 512, 10)

    def descend(params: Any, grads: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    new = bh.Collector(lambda visit: descend(visit.params, visit.dparams), degree=1)
    for name, body in (("unrolled", [layer] * 8), ("by repeat", [bh.repeat(layer, 8)])):
        objective = classifier(*body, bh.dense(10))
        params = objective.init(jax.random.key(0), batch)
        at_once, evaluate = bh.value_and_collect(objective, new=new), bh.value_and_grad(objective)

        def on_the_way(params: Any, batch: Batch, run: Any = at_once) -> Any:
            return run(params, batch)[1]["new"]

        def afterwards(params: Any, batch: Batch, run: Any = evaluate) -> Any:
            return descend(params, run(params, batch)[1])

        sides = [
            jax.jit(side, donate_argnums=0).lower(params, batch).compile()
            for side in (on_the_way, afterwards)
        ]
        mine, theirs = (side.memory_analysis().temp_size_in_bytes / 1e6 for side in sides)
        times, ratio = in_turns(*(repeated(side, params, batch) for side in sides), samples=11)
        place = f"8 x 512-512 {name}, batch 32"
        what = "descent on the way back", place, "descent afterwards"
        yield Result(*what, times, ratio, (mine, theirs), mine / theirs)


def repeated(step: Callable[..., Any], params: Any, batch: Batch) -> Callable[[], Any]:
    """A call that continues from the parameters of the call before, which are donated."""
    params = jax.tree.map(jnp.copy, params)

    def run() -> Any:
        nonlocal params
        params = step(params, batch)
        return params

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    arguments = parser.parse_args()
    results = []
    for group in (exactness, cost, many_steps, updates):
        for result in group():
            print(table([result]).splitlines()[-1], flush=True)
            results.append(result)
    print(f"\n{table(results)}\n\n" + "\n".join(memory()) + f"\n\n{machine()}")
    if arguments.json:
        write(results, arguments.json)


if __name__ == "__main__":
    main()
