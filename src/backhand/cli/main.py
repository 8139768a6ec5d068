"""The commands: what they take, what they run, how they end."""

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeAlias

from backhand import __version__
from backhand.audit import Audit, Report, check, compare
from backhand.audit.check import SKIPPABLE
from backhand.audit.html import of_audit, of_report, page
from backhand.audit.inputs import RefusedError
from backhand.cli.output import (
    STANDARD_OUTPUT,
    check_writable,
    write_json,
    write_lines,
    write_text,
)
from backhand.cli.subjects import of_check, of_compare
from backhand.cli.targets import BadUsage, guarded, load

Results: TypeAlias = "list[Audit | Report]"

AGREES, DIFFERS, BAD_USAGE = 0, 1, 2
"""The exit statuses."""

_COMPARE = """\
Compares two ways to the same gradient, leaf by leaf.

    backhand compare examples/digits.py
    backhand compare mypackage.losses:both --html report.html

The target is a function without required arguments, `audit` if none is named. It returns
what bh.compare takes, as a tuple: (objective, params, batch), or (f, g, *arguments) for
two functions; or the report that bh.compare gives."""

_CHECK = """\
Audits a hand-written backward pass, and says what is wrong with which leaf.

    backhand check ops.linear
    backhand check mypackage.ops:swish --arg "f32[4,8]"
    backhand check mypackage.ops:swish --arg "f32[4,8]" --reference mypackage.plain:swish
    backhand check tests/cases.py:gated

The target is a row of the catalogue, which has its own arguments; an op, a layer or a
function with a custom_vjp, with an --arg for each of its arguments (of a layer, for its
input); or a function without required arguments, `audit` if none is named, that returns
(subject, *arguments) as bh.check takes them."""

_STATUS = "The exit status is 0 if all agrees, 1 if something differs, 2 if it can't be judged."


class Parser(argparse.ArgumentParser):
    """Arguments; an error is one line and status 2."""

    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse puts before it."""
        self.exit(BAD_USAGE, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: what follows the name of the program; None for what it was started with.

    Returns:
        The exit status: 0 if all agrees, 1 if something differs, 2 for bad usage.
    """
    args = _parser().parse_args(argv)
    try:
        check_writable("--json", args.json)
        check_writable("--html", args.html)
        # Standard output is then JSON alone, whatever is printed on the way.
        json_only = args.json == STANDARD_OUTPUT
        with contextlib.redirect_stdout(sys.stderr) if json_only else contextlib.nullcontext():
            results: Results = []
            for result in args.run(args):
                write_lines(f"\n{result}" if results else str(result))
                results.append(result)
    except BadUsage as error:
        if args.traceback and error.__cause__ is not None:
            traceback.print_exception(error.__cause__.__context__ or error.__cause__)
        more = "" if args.traceback or error.__cause__ is None else " (--traceback shows where)"
        print(f"backhand {args.command}: error: {error}{more}", file=sys.stderr)
        return BAD_USAGE
    if args.json is not None:
        values = [result.to_dict() for result in results]
        # A row's name may stand for several settings: of `check` there is always a list.
        many = {"passed": _passed(results), "audits": values}
        write_json(args.json, many if args.command == "check" else values[0])
    if args.html is not None:
        parts = (of_audit(r) if isinstance(r, Audit) else of_report(r) for r in results)
        write_text(args.html, page(f"backhand {args.command} {args.target}", *parts))
    return AGREES if _passed(results) else DIFFERS


def _passed(results: Results) -> bool:
    return all(r.passed if isinstance(r, Audit) else r.agrees for r in results)


def _parser() -> Parser:
    parser = Parser(prog="backhand", description="Is a hand-written gradient right?")
    parser.add_argument("--version", action="version", version=f"backhand {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, description in (("compare", _compare, _COMPARE), ("check", _check, _CHECK)):
        command = commands.add_parser(
            name,
            help=description.splitlines()[0],
            description=description,
            epilog=_STATUS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        add = command.add_argument
        add("target", metavar="TARGET", help="path/to/file.py[:name] or package.module[:name]")
        if name == "check":
            add(
                "--arg",
                action="append",
                default=[],
                metavar="ARRAY",
                help='a random argument, as "f32[4,8]", "i32[4]<10" or "key"; once for each',
            )
            add("--reference", metavar="TARGET", help="a plain function that gives the same")
            add(
                "--skip",
                action="append",
                default=[],
                choices=sorted(SKIPPABLE),
                metavar="CHECK",
                help=f"leave a check out: {', '.join(sorted(SKIPPABLE))}",
            )
            add(
                "--hold",
                action="append",
                default=[],
                metavar="ARGUMENT",
                help="an argument of floating point that is not differentiated, such as a mask",
            )
            add("--seed", type=int, default=0, help="of everything random (default: 0)")
        add("--json", metavar="FILE", help="where to write the numbers; - for standard output")
        add("--html", metavar="FILE", help="where to write a page that opens offline")
        add("--traceback", action="store_true", help="show where an error was raised")
    return parser


def _compare(args: argparse.Namespace) -> Iterator[Audit | Report]:
    """The report of `backhand compare`."""
    given = of_compare(args.target)
    yield _judged(args.target, compare, *given) if isinstance(given, tuple) else given


def _check(args: argparse.Namespace) -> Iterator[Audit | Report]:
    """The audits of `backhand check`."""
    if args.seed < 0:
        raise BadUsage(f"--seed must be 0 or more, got {args.seed}")
    reference = None if args.reference is None else load(args.reference)
    for given in of_check(args.target, args.arg, args.seed):
        if isinstance(given, tuple):
            settings = {
                "reference": reference,
                "seed": args.seed,
                "skip": args.skip,
                "hold": args.hold,
            }
            yield _judged(args.target, check, *given, **settings)
        else:
            yield given


def _judged(target: str, judge: Callable[..., Any], *given: Any, **settings: Any) -> Any:
    """What `compare` or `check` finds; the errors they raise themselves say all there is to say."""
    try:
        return guarded(target, judge, *given, **settings)
    except BadUsage as error:
        plain = type(error.__cause__) in (TypeError, ValueError)
        if plain or isinstance(error.__cause__, RefusedError):
            raise BadUsage(f"{target}: {error.__cause__}") from error.__cause__
        raise
