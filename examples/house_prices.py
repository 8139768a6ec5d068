"""Predicts house prices from square metres, bedrooms, age and distance to the centre.

    python examples/house_prices.py
    python examples/house_prices.py --data houses.csv --target price

About 5 seconds on two CPU cores. The houses are made, by a formula and a normal error of 20,000
euros (`bh.data.houses`). Prints the error on houses held out, near 16,000 euros in the mean and
20,000 in the root mean square, where the mean price for all gives 104,000 and 126,000; and that the
hand-written gradient is jax.grad's. With --data it reads any table with a header instead: numbers,
categories and missing values.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np

import backhand as bh
from common import Parser, cosine, progress, write_metrics

HOUSES = 5_000
NOISE = 20_000  # euros, standard deviation


def read_data(args: argparse.Namespace) -> bh.data.Table:
    if args.data is None:
        given = [name for name in ("target", "categorical", "ignore") if getattr(args, name)]
        if given:
            raise ValueError(f"--{given[0]} needs a table: pass --data FILE")
        return bh.data.houses(HOUSES, seed=args.seed, noise=NOISE)
    if args.target is None:
        raise ValueError("--data needs --target NAME, the column to predict")
    return bh.data.read_table(
        args.data, target=args.target, categorical=args.categorical, ignore=args.ignore
    )


def errors(predictions: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """The mean absolute and the root mean squared error."""
    difference = predictions - targets
    return float(np.mean(np.abs(difference))), math.sqrt(np.mean(np.square(difference)))


def show(rows: dict[str, tuple[float, float]]) -> None:
    """A table of errors, to the unit where they are large."""
    width = max(map(len, rows))
    digits = 0 if max(max(row) for row in rows.values()) >= 100 else 3
    print(f"{'':{width}}{'mean absolute':>16}{'root mean squared':>20}")
    for name, (absolute, squared) in rows.items():
        print(f"{name:{width}}{absolute:16,.{digits}f}{squared:20,.{digits}f}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, steps=2000, batch_size=64, learning_rate=3e-3, optimizer="adamw")
    parser.add_argument("--data", metavar="FILE", help="a CSV file (default: made houses)")
    parser.add_argument("--target", metavar="NAME", help="its column to predict")
    for name, what in (("categorical", "whose numbers are codes"), ("ignore", "to leave out")):
        parser.add_argument(
            f"--{name}", nargs="+", metavar="NAME", default=(), help=f"its columns {what}"
        )
    args = parser.parse(argv)
    with parser.one_line_errors():
        table = read_data(args)
        train, test = table.split(test_fraction=0.2, seed=args.seed)
        encoder = bh.data.fit_encoder(train)
        bar = progress(args.steps)
    print(table)

    batches = bh.data.Batches(encoder.encode(train), args.batch_size, seed=args.seed)
    model = bh.chain(
        hidden=bh.dense(64), act=bh.gelu(), hidden2=bh.dense(64), act2=bh.gelu(), out=bh.dense(1)
    )
    loss = bh.objective(model, bh.losses.mean_squared_error)
    optimizer = cosine(args)
    params = loss.init(jax.random.key(args.seed), batches[0])
    state = bh.train_state(params, optimizer)
    step = bh.train_step(loss, optimizer, accumulate=args.accumulate, gradients=args.gradients)
    for i in bar:
        state, metrics = step(state, batches[i])
        if i % 100 == 0:
            bar.set_postfix(loss=f"{metrics['loss']:.4f}")

    scaled = model(state.params, jnp.asarray(encoder.encode(test)["inputs"]))
    predictions = encoder.decode_targets(scaled)[:, 0]
    absolute, squared = errors(predictions, test.targets)
    of_mean = errors(np.full_like(test.targets, encoder.target_mean), test.targets)
    rows = {"this model": (absolute, squared), f"the mean {table.target} for all": of_mean}
    if args.data is None:
        rows["the noise alone, expected"] = NOISE * math.sqrt(2 / math.pi), NOISE
    unit = "euros" if args.data is None else f"the unit of {table.target}"
    print(f"\nError on {len(test)} rows held out, in {unit}:\n")
    show(rows)

    report = bh.compare(loss, state.params, batches[0])
    print(f"\n{report.verdict}")
    write_metrics(
        args.json,
        {
            "test_mean_absolute_error": absolute,
            "test_root_mean_squared_error": squared,
            "mean_root_mean_squared_error": of_mean[1],
            "loss": float(metrics["loss"]),
            "gradients_agree": report.agrees,
        },
    )


if __name__ == "__main__":
    main()
