"""What exact accumulation costs, and how far other ways to accumulate are off.

    python -m benchmarks.accumulation [--only TABLE ...] [--json FILE] [--markdown FILE]

Errors are of the gradient against float64 on the whole batch: the largest in a leaf, over its
largest element. Ratios are ours / theirs: below 1 is faster or leaner. Memory is what XLA allots
beside arguments and results. FILE is written after each row.
"""

import argparse
import dataclasses
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
from benchmarks.accumulation_models import Batch, masked, mlp, models
from benchmarks.measure import Result, in_turns, memory_ratio, side_by_side, temporary
from benchmarks.report import machine, table, today, write
from benchmarks.training_step import frozen_flops, frozen_table, many_steps, updates

SUM, MEAN = microbatching.AccumulationType.SUM, microbatching.AccumulationType.MEAN


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
    """`optax.microbatching` at its best: of sums and weights, in float32, for the purpose."""

    def total(params: Any, batch: Batch) -> tuple[Any, Any]:
        terms = objective.forward(params, batch)[0]
        return terms.total, terms.weight

    def wide(params: Any, batch: Batch) -> tuple[Any, Any]:
        grads, weight = jax.grad(total, has_aux=True)(params, batch)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), weight

    def run(params: Any, batch: Batch) -> Any:
        size = len(batch["targets"]) // micro_batches
        grads, weight = microbatching.microbatch(wide, 1, size, SUM)(params, batch)
        return jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, params)

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


def exactness(samples: int) -> Iterator[Result]:
    """The same masked batch, every way; also at 512 micro-batches, in float32 and bfloat16."""
    low = jnp.bfloat16
    settings: list[tuple[str, bh.Objective, int, Batch, Any]] = [
        ("784-256-10, batch 1024", mlp(256, 10), 16, masked(1024, 784, 10), jnp.float32),
        ("64-64-10, batch 1024", mlp(64, 10), 512, masked(1024, 64, 10), jnp.float32),
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
                "bh.accumulate", place, name, mine, other, params, batch, samples=samples
            )
            errors = own, error(jax.jit(other)(params, batch), truth)
            yield dataclasses.replace(result, error=errors)


# Cost ---------------------------------------------------------------------------------------------


def several(batch: Batch, micro_batches: int) -> Batch:
    """As many micro-batches as one batch."""
    return jax.tree.map(lambda x: jnp.concatenate([x] * micro_batches), batch)


def cost(samples: int) -> Iterator[Result]:
    """K micro-batches in one call, against K calls of the plain gradient of one."""
    for name, objective, size, part in models():
        params = objective.init(jax.random.key(0), part)
        evaluate = bh.value_and_grad(objective)
        plain = compiled(evaluate, params, part)
        for count in (7, 8):
            batch = several(part, count)
            accumulated = compiled(bh.accumulate(evaluate, count), params, batch)
            used = temporary(accumulated), temporary(plain)
            megabytes = used[0] / 1e6, used[1] / 1e6
            for waits in ("", ", one by one"):
                timing = in_turns(
                    lambda run=accumulated, params=params, batch=batch: run(params, batch),
                    calls(plain, params, part, count, bool(waits)),
                    samples=samples,
                )
                yield Result(
                    "bh.accumulate",
                    f"{name}, {count} x {size}",
                    f"{count} plain gradients{waits}",
                    *timing,
                    megabytes,
                    memory_ratio(*used),
                )


def compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function as one program."""
    return jax.jit(lambda *given: function(*given)).lower(*arguments).compile()


def calls(plain: Any, params: Any, part: Batch, count: int, waiting: bool) -> Callable[[], Any]:
    """`count` gradients; `waiting`, each for the one before."""

    def run() -> Any:
        for _ in range(count):
            result = plain(params, part)
            if waiting:
                jax.block_until_ready(result)
        return result

    return run


@dataclasses.dataclass(frozen=True)
class Memory:
    """Temporary memory of a step with AdamW, in MB.

    Attributes:
        setting: the model, and the size of a micro-batch.
        gradient: what one gradient takes.
        used: by the number of micro-batches.
        above: by that number, what they take above a step of one, in gradients.
        growth: what the most micro-batches take above two, in gradients.
        floor: what the sums and one pass that makes next to no gradient take above one
            micro-batch's step, in gradients: no order of work can avoid that, for the sums are
            there while the activations of a later micro-batch are at their peak.
    """

    setting: str
    gradient: float
    used: dict[int, float]
    above: dict[int, float]
    growth: float
    floor: float


COUNTS = (1, 2, 4, 8, 16, 32)


def memory() -> Iterator[Memory]:
    """Temporary memory of a whole step against the number of micro-batches."""
    for setting, objective, size, part in models():
        params = objective.init(jax.random.key(0), part)
        gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
        optimizer = optax.adamw(1e-3)
        state = bh.train_state(params, optimizer)
        used = {}
        for micro_batches in COUNTS:
            data = several(part, micro_batches)
            step = bh.train_step(objective, optimizer, accumulate=micro_batches)
            used[micro_batches] = temporary(step.jitted.lower(state, data).compile()) / 1e6
        lone = jax.jit(first_bias(objective)).lower(params, part).compile()
        above = {count: (used[count] - used[1]) / gradient for count in COUNTS[1:]}
        floor = (gradient + temporary(lone) / 1e6 - used[1]) / gradient
        yield Memory(
            f"{setting}, {size} each",
            gradient,
            used,
            above,
            above[COUNTS[-1]] - above[2],
            max(0.0, floor),
        )


def first_bias(objective: bh.Objective) -> Callable[..., Any]:
    """The smallest gradient of the first layer: all activations, and next to no gradient."""

    def run(params: Any, batch: Batch) -> Any:
        return min(jax.tree.leaves(bh.grad(objective)(params, batch)[0]), key=lambda g: g.size)

    return run


def memory_table(rows: list[Memory]) -> str:
    counts = " | ".join(map(str, COUNTS[1:]))
    lines = [
        f"| step with AdamW | gradient, MB | K = 1, MB | above it, in gradients: K = {counts} "
        "| floor |",
        f"|---|---|---|{'---|' * len(COUNTS)}",
    ]
    for row in rows:
        above = " | ".join(f"**{row.above[count]:.2f}**" for count in COUNTS[1:])
        lines.append(
            f"| {row.setting} | {row.gradient:.2f} | {row.used[1]:.2f} | {above} "
            f"| {row.floor:.2f} |"
        )
    return "\n".join(lines)


HEAD = """# What exact accumulation costs

`python -m benchmarks.accumulation --markdown FILE` on {date}; ours : theirs, medians of
interleaved samples; ratios below 1 are faster or leaner.

{machine}
"""

SECTIONS = {
    "exactness": """Against other ways to accumulate

The gradient of the same masked batch every way, without an update. Its error against float64 is the
largest in a leaf, over its largest element; in bfloat16, that of parameters and inputs, half a
percent is the rounding of the result. `optax.MultiSteps` and "means" average the gradients of mean
losses, which is how they are documented: exact for equal weights, and for these another gradient,
not a rounded one. "sums" is what one can write with Optax to be exact: sums and weights, in
float32.""",
    "cost": """Against as many plain gradients

K micro-batches in one call against K calls of the plain gradient of one: all asked for at once, so
that two cores may run two of them at a time, and nothing waits for what they gave; and one by one,
as in a training whose every step needs the one before. The plain gradients are not added up, and
hold no sums: what those take is in the table of memory.""",
    "memory": """Temporary memory of a step

What XLA allots beside arguments and results. It does not grow with K from 2 on. The floor is what
the sums and the activations of one micro-batch take above a step without accumulation: where a
model's gradients are applied one by one as they come, and never are whole, that is nearly all of
a gradient, and half of one is out of reach. Where gradients are small beside activations (the
20 kB of 64-64-10, the convolutions' 0.2 MB) it is the sums, which are there all along; of the LSTM
XLA also keeps a scaled copy of the recurrent weights outside of the loop. With automatic gradients
under `repeat`, and with several objectives in one, a micro-batch's gradient is whole before it is
added: one gradient above.""",
    "steps": """Many steps in one call

A ratio of 0.33 is three times the steps a second.""",
    "frozen": """Frozen parameters

Floating-point operations of a step with plain descent, by XLA's count: the reverse work of what is
frozen is gone.""",
    "updates": """Updating while going back

A collector that gives a layer's parameters their update as soon as its gradient is there, in the
place of a gradient that is applied afterwards. On CPU it is no leaner: XLA applies an unrolled
model's updates as they come by itself, and a scan over depth stacks new parameters as it would
gradients. So the library has no such rule.""",
}


def page(tables: dict[str, str]) -> str:
    """The tables that there are, each under its heading."""
    head = HEAD.format(date=today(), machine=machine())
    return "\n".join([head, *(f"## {SECTIONS[name]}\n\n{own}\n" for name, own in tables.items())])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="some of the tables"
    )
    parser.add_argument(
        "--samples", type=int, default=15, help="pairs of times for each figure, by default 15"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    given = parser.parse_args()
    if given.samples < 1:
        parser.error(f"--samples needs at least 1, got {given.samples}")
    parts: dict[str, tuple[Callable[[], Iterator[Any]], Callable[[list[Any]], str]]] = {
        "exactness": (lambda: exactness(given.samples), table),
        "cost": (lambda: cost(given.samples), table),
        "memory": (memory, memory_table),
        "steps": (lambda: many_steps(given.samples), table),
        "frozen": (frozen_flops, frozen_table),
        "updates": (lambda: updates(given.samples), table),
    }
    rows: dict[str, list[Any]] = {}
    for name, (run, written) in parts.items():
        if name not in given.only:
            continue
        print(f"\n{name}", flush=True)
        for row in run():
            rows.setdefault(name, []).append(row)
            print(written([row]).splitlines()[-1], flush=True)
            if given.json:
                write(given.json, **rows)
    if given.markdown:
        tables = {name: parts[name][1](own) for name, own in rows.items()}
        given.markdown.write_text(page(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
