"""What the examples share: the flags, the checks before training, the progress bar, the metrics."""

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import optax

OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": functools.partial(optax.adamw, weight_decay=0.1),
    "lion": functools.partial(optax.lion, weight_decay=0.1),
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
}


class Parser(argparse.ArgumentParser):
    """The flags of every example, with its own defaults; an error is one line and status 2.

    Args:
        description: the example's docstring.
        optimizers: the names that `--optimizer` takes; empty for a trainer of another library,
            which has no choice of gradients and micro-batches either.
        defaults: `steps`, `batch_size`, `learning_rate` and `optimizer`.
    """

    def __init__(
        self, description: str | None, optimizers: Collection[str] = OPTIMIZERS, **defaults: Any
    ) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        shown = {name: f"default: {value}" for name, value in defaults.items()}
        add = self.add_argument
        add("--steps", type=int, help=f"updates to make ({shown['steps']})")
        add("--batch-size", type=int, help=f"examples in a batch ({shown['batch_size']})")
        add("--learning-rate", type=float, help=f"its largest value ({shown['learning_rate']})")
        if optimizers:
            add("--accumulate", type=int, default=1, help="micro-batches in a batch (default: 1)")
            add(
                "--gradients",
                choices=("manual", "automatic"),
                default="manual",
                help="hand-written, or by jax.grad (default: manual)",
            )
            add("--optimizer", choices=sorted(optimizers), help=f"the rule ({shown['optimizer']})")
        add("--seed", type=int, default=0, help="of the split, the start, the order (default: 0)")
        add("--json", type=Path, metavar="FILE", help="where to write the metrics")
        self.set_defaults(**defaults)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The flags, checked."""
        args = self.parse_args(argv)
        if args.steps < 1:
            self.error(f"--steps must be 1 or more, got {args.steps}")
        if args.batch_size < 1:
            self.error(f"--batch-size must be 1 or more, got {args.batch_size}")
        if not 0 < args.learning_rate < math.inf:
            self.error(f"--learning-rate must be finite and above 0, got {args.learning_rate}")
        if "accumulate" in args and (args.accumulate < 1 or args.batch_size % args.accumulate):
            self.error(
                f"--accumulate must be a divisor of the batch size {args.batch_size}, "
                f"got {args.accumulate}"
            )
        if args.seed < 0:
            self.error(f"--seed must be 0 or more, got {args.seed}")
        if args.json is not None:
            self._check_writable(args.json)
        return args

    @contextlib.contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Around what a user can get wrong beside the flags: a file, a missing package."""
        try:
            yield
        except (ImportError, OSError, ValueError) as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse puts before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _check_writable(self, path: Path) -> None:
        if path.is_dir():
            self.error(f"--json needs the name of a file, got the folder {path}")
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            self.error(f"--json {path} can't be written: {error.strerror or error}")


def cosine(args: argparse.Namespace) -> optax.GradientTransformation:
    """The update rule of the flags, its learning rate falling to 0 as a cosine."""
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.steps)
    return OPTIMIZERS[args.optimizer](schedule)


def progress(steps: int) -> Any:
    """The steps, with a bar where there is a terminal to draw it on."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            'the progress bar needs tqdm; install it with: pip install "backhand[examples]"'
        ) from error
    return tqdm(range(steps), unit="step", disable=not sys.stderr.isatty())


def side_by_side(
    steps: Mapping[str, Callable[[Mapping[str, Any]], Any]],
    batches: Sequence[Mapping[str, Any]],
    count: int,
) -> dict[str, float]:
    """Trains two models on the same batches, a step of each in turn, and prints their losses.

    Args:
        steps: by name, a function that makes one update from a batch and gives its loss.
        batches: one for each step.
        count: how many steps to make.

    Returns:
        The two last losses, the largest difference of the two at any step over the first loss, and
        the time of a step of the second over that of the first, as a median.
    """
    names = list(steps)
    losses: dict[str, list[float]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    print(f"{'step':>6}" + "".join(f"{name:>24}" for name in names))
    for i in progress(count):
        for name in names:
            begin = time.perf_counter()
            losses[name].append(float(steps[name](batches[i])))
            times[name].append(time.perf_counter() - begin)
        if i % max(1, count // 10) == 0 or i == count - 1:
            print(f"{i:>6}" + "".join(f"{losses[name][-1]:>24.6f}" for name in names))
    pairs = list(zip(*losses.values(), strict=True))
    apart = max(abs(a - b) for a, b in pairs) / pairs[0][0]
    first, second = (statistics.median(times[name][1:] or times[name]) for name in names)
    print(f"\nThe losses are never further apart than {apart:.1e} of the first one;")
    print(f"a step with three ops swapped takes {second / first:.2f} of the other's time.")
    found = dict(zip(("loss", "loss_swapped"), pairs[-1], strict=True))
    return {**found, "largest_difference": apart, "time_ratio": second / first}


def write_metrics(path: Path | None, metrics: Mapping[str, float]) -> None:
    """Writes JSON, where a path is given: the whole file or, if interrupted, nothing of it.

    What is not finite becomes null: JSON has no NaN.
    """
    if path is None:
        return
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(finite, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
