"""What exact accumulation costs, and how far other ways to accumulate are off.

    python -m benchmarks.accumulation [--json FILE] [--markdown FILE]

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
from benchmarks.measure import Result, in_turns, memory_ratio, side_by_side, temporary
from benchmarks.report import machine, table, today, write

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
    """Models with the size of a micro-batch, and a masked one."""
    wide = mlp(1024, 1024, 10)
    yield "64-64-10", mlp(64, 10), 32, masked(32, 64, 10)
    yield "784-1024-1024-10", wide, 32, masked(32, 784, 10)
    yield "784-1024-1024-10", wide, 256, masked(256, 784, 10)
    block = bh.skip(bh.chain(bh.layer_norm(), bh.dense(1024), bh.gelu(), bh.dense(256)))
    four = classifier(*[block] * 4, bh.dense(10))
    yield "4 x 256-1024-256", four, 128, masked(128, 256, 10)
    deep = classifier(bh.repeat(block, 4), bh.dense(10))
    yield "4 x 256-1024-256 by repeat", deep, 128, masked(128, 256, 10)
    convolutions = [layer for _ in range(2) for layer in (bh.conv(64, (3, 3)), bh.relu())]
    images = classifier(*convolutions, bh.global_average_pool(), bh.dense(10))
    yield "2 convolutions of 64", images, 4, reshaped(masked(4, 16 * 16 * 16, 10), 16, 16, 16)
    recurrent = classifier(bh.lstm(256), bh.global_average_pool(), bh.dense(10))
    yield "LSTM of 256, 32 steps", recurrent, 4, reshaped(masked(4, 32 * 64, 10), 32, 64)


def reshaped(batch: Batch, *shape: int) -> Batch:
    """The batch with each example's inputs in another shape."""
    return {**batch, "inputs": batch["inputs"].reshape(-1, *shape)}


def several(batch: Batch, micro_batches: int) -> Batch:
    """As many micro-batches as one batch."""
    return jax.tree.map(lambda x: jnp.concatenate([x] * micro_batches), batch)


def cost() -> Iterator[Result]:
    """K micro-batches in one call, against K calls of the plain gradient of one."""
    for name, objective, size, part in models():
        params = objective.init(jax.random.key(0), part)
        evaluate = bh.value_and_grad(objective)
        for count in (7, 8):
            accumulated = bh.accumulate(evaluate, count)
            result = side_by_side(
                "bh.accumulate",
                f"{name}, {count} x {size}",
                f"{count} plain gradients",
                lambda params, batch, _, run=accumulated: run(params, batch),
                lambda params, _, part, run=evaluate: run(params, part),
                params,
                several(part, count),
                part,
            )
            one, each = result.milliseconds
            yield dataclasses.replace(
                result,
                milliseconds=(one, count * each),
                time_ratio=result.time_ratio / count,
                time_low=result.time_low / count,
                time_high=result.time_high / count,
            )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Temporary memory of a step with AdamW, in MB.

    Attributes:
        setting: the model, and the size of a micro-batch.
        gradient: what one gradient takes.
        used: by the number of micro-batches.
        above: what the most micro-batches take above one, in gradients.
        floor: what the sums and one pass that makes next to no gradient take above one
            micro-batch's step, in gradients: no order of work can avoid that, for the sums are
            there while the activations of a later micro-batch are at their peak.
    """

    setting: str
    gradient: float
    used: dict[int, float]
    above: float
    floor: float


def memory() -> Iterator[Memory]:
    """Temporary memory of a whole step against the number of micro-batches."""
    for setting, objective, size, part in models():
        params = objective.init(jax.random.key(0), part)
        gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
        optimizer = optax.adamw(1e-3)
        state = bh.train_state(params, optimizer)
        used = {}
        for micro_batches in (1, 2, 8, 32):
            data = several(part, micro_batches)
            step = bh.train_step(objective, optimizer, accumulate=micro_batches)
            used[micro_batches] = temporary(step.jitted.lower(state, data).compile()) / 1e6
        lone = jax.jit(first_bias(objective)).lower(params, part).compile()
        above, floor = (x - used[1] for x in (used[32], gradient + temporary(lone) / 1e6))
        yield Memory(
            f"{setting}, {size} each",
            gradient,
            used,
            above / gradient,
            max(0.0, floor / gradient),
        )


def first_bias(objective: bh.Objective) -> Callable[..., Any]:
    """The smallest gradient of the first layer: all activations, and next to no gradient."""

    def run(params: Any, batch: Batch) -> Any:
        return min(jax.tree.leaves(bh.grad(objective)(params, batch)[0]), key=lambda g: g.size)

    return run


def memory_table(rows: list[Memory]) -> str:
    lines = [
        "| step with AdamW | gradient, MB | K = 1 | 2 | 8 | 32 | above K = 1, in gradients "
        "| floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(f"{megabytes:.2f}" for megabytes in (row.gradient, *row.used.values()))
        lines.append(f"| {row.setting} | {figures} | **{row.above:.2f}** | {row.floor:.2f} |")
    return "\n".join(lines)


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
        timing = in_turns(once, runner(other, batch, steps), samples=9)
        yield Result(f"{steps} steps in one call", place, against, *timing, (0, 0), 1.0)


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
        mine, theirs = (temporary(side) for side in sides)
        timing = in_turns(*(repeated(side, params, batch) for side in sides), samples=11)
        place = f"8 x 512-512 {name}, batch 32"
        what = "descent on the way back", place, "descent afterwards"
        megabytes = mine / 1e6, theirs / 1e6
        yield Result(*what, *timing, megabytes, memory_ratio(mine, theirs))


def repeated(step: Callable[..., Any], params: Any, batch: Batch) -> Callable[[], Any]:
    """A call that continues from the parameters of the call before, which are donated."""
    params = jax.tree.map(jnp.copy, params)

    def run() -> Any:
        nonlocal params
        params = step(params, batch)
        return params

    return run


PAGE = """# What exact accumulation costs

`python -m benchmarks.accumulation --markdown FILE` on {date}; ours : theirs, medians of
interleaved samples; ratios below 1 are faster or leaner.

{machine}

## Against other ways to accumulate

The same masked batch every way, the gradient's error against float64: the largest in a leaf, over
its largest element. A mean of means is another gradient, not a rounded one.

{exactness}

## Against as many plain gradients

{cost}

## Temporary memory of a step

What XLA allots beside arguments and results. It does not grow with K from 2 on. The floor is what
the sums and the activations of one micro-batch take above a step without accumulation: where a
model's gradients are applied one by one as they come, and never are whole, that is nearly all of
a gradient, and half of one is out of reach. With automatic gradients under `repeat`, and with
several objectives in one, a micro-batch's gradient is whole before it is added: one gradient
above.

{memory}

## Many steps in one call

{steps}

## Updating while going back

A collector that gives a layer's parameters their update as soon as its gradient is there, in the
place of a gradient that is applied afterwards. It is no leaner: XLA applies an unrolled model's
updates as they come by itself, and a scan over depth stacks new parameters as it would gradients.
So the library has no such rule. Not measured on a GPU.

{updates}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    arguments = parser.parse_args()
    groups: dict[str, list[Result]] = {}
    parts = {"exactness": exactness, "cost": cost, "steps": many_steps, "updates": updates}
    for name, run in parts.items():
        for result in run():
            print(table([result]).splitlines()[-1], flush=True)
            groups.setdefault(name, []).append(result)
    sizes = list(memory())
    print(memory_table(sizes))
    if arguments.markdown:
        tables = {name: table(results) for name, results in groups.items()}
        page = PAGE.format(date=today(), machine=machine(), memory=memory_table(sizes), **tables)
        arguments.markdown.write_text(page, encoding="utf-8")
    if arguments.json:
        results = [result for own in groups.values() for result in own]
        write(results, arguments.json, memory=[dataclasses.asdict(row) for row in sizes])


if __name__ == "__main__":
    main()
