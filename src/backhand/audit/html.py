"""Audits and reports as HTML: a fragment for notebooks, and a page that opens offline.

Text, tables and small pictures, with nothing to load and nothing that runs. Colours are those of
the page around it, so that it reads on light and on dark ground, and no colour is without a word.
"""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from backhand.audit.heatmap import MOST, HeatMap, heat_map
from backhand.audit.report import Report
from backhand.audit.result import Audit, Cost, Finding, Leaf, sized

PICTURES = 24
"""The most heat maps on a page: those that differ first, then in the order of the leaves."""

STYLE = """
.backhand { font: 14px/1.5 system-ui, sans-serif; max-width: 72rem; }
.backhand h2 { font-size: 1.25em; margin: .2em 0 .6em; }
.backhand h3 { font-size: 1em; margin: 1.4em 0 .4em; }
.backhand table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.backhand .wide { overflow-x: auto; }
.backhand :is(td, th) { padding: .2em .8em .2em 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid rgb(128 128 128 / .35); }
.backhand code { font-family: ui-monospace, monospace; }
.backhand .badge { border-radius: .3em; padding: 0 .45em; color: #fff; white-space: nowrap; }
.backhand .right { background: #1a7f37; }
.backhand .wrong { background: #b42318; }
.backhand .maps { display: flex; flex-wrap: wrap; gap: 1.2em; }
.backhand figure { margin: 0; max-width: 26rem; }
.backhand img { image-rendering: pixelated; display: block;
  border: 1px solid rgb(128 128 128 / .7); }
.backhand .swatch { display: inline-block; width: .8em; height: .8em; }
""".strip()


def of_audit(audit: Audit) -> str:
    """The fragment for what `bh.check` found.

    Example:
        >>> of_audit(Audit("square", (), ()))[:31]
        '<section class="backhand"><styl'
    """
    ran = [finding for finding in audit.findings if not finding.skipped]
    failed = audit.failures
    count = f"in {len(failed)} of {len(ran)} checks" if failed else f"all of {len(ran)} checks"
    wrong = [_finding(finding) for finding in failed]
    passed = [_finding(finding) for finding in ran if finding.passed]
    skipped = [_finding(finding) for finding in audit.findings if finding.skipped]
    return _section(
        f"<h2>{_badge(audit.passed, 'passed', 'FAILED')} {escape(audit.name)}: {count}</h2>",
        _items("What is wrong", wrong),
        _items("By design?", [escape(advice) for advice in audit.advice]),
        _leaves(audit.leaves),
        _maps([(leaf.path, leaf.agrees, leaf.ours, leaf.truth) for leaf in audit.leaves]),
        _costs(audit.cost),
        _folded(f"What passed ({len(passed)})", passed),
        _folded(f"What does not apply ({len(skipped)})", skipped),
    )


def of_report(report: Report) -> str:
    """The fragment for what `bh.compare` found."""
    causes = [
        f"<code>{escape(row.path)}</code>: {escape(row.cause.message)}"
        for row in report.rows
        if row.cause is not None
    ]
    head = ("leaf", "shape", "dtype", "largest difference", "relative", "at", "cosine", "norms", "")
    rows = [
        (
            _code(row.path),
            _shape(row.shape),
            row.dtype,
            _number(row.difference),
            _number(row.relative),
            ", ".join(map(str, row.where)),
            f"{row.cosine:.6f}",
            f"{row.norm_ratio:.6f}",
            _badge(row.agrees, "agrees", "DIFFERS") + f" {escape(row.note)}",
        )
        for row in report.rows
    ]
    values = ", ".join(
        f"{escape(name)} {value!r}" for name, value in zip(report.names, report.values, strict=True)
    )
    return _section(
        f"<h2>{_badge(report.agrees, 'agrees', 'DIFFERS')} {escape(report.verdict)}</h2>",
        f"<p>The values: {values}.</p>",
        _items("What is wrong", causes),
        _table("Leaf by leaf", head, rows),
        _maps(
            [(row.path, row.agrees, *row.stacked) for row in report.rows if row.stacked is not None]
        ),
    )


def page(title: str, *fragments: str) -> str:
    """A whole page: one file that opens offline, light or dark as the reader's system is."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        "<style>:root { color-scheme: light dark; } body { margin: 2rem; }</style>\n"
        f"</head>\n<body>\n{'<hr>'.join(fragments)}\n</body>\n</html>\n"
    )


def _section(*parts: str) -> str:
    return f'<section class="backhand"><style>{STYLE}</style>{"".join(parts)}</section>'


def _badge(right: bool, yes: str, no: str) -> str:
    """A verdict: a word and a sign, and then a colour."""
    kind, text = ("right", f"✓ {yes}") if right else ("wrong", f"✗ {no}")
    return f'<span class="badge {kind}">{text}</span>'


def _finding(finding: Finding) -> str:
    where = f"{_code(finding.path)}: " if finding.path else ""
    why = f": {escape(finding.cause.message)}" if finding.cause else ""
    return f"{where}{escape(finding.message)}{why} ({escape(finding.check)})"


def _leaves(leaves: Sequence[Leaf]) -> str:
    """The table of leaves; by dtype, the error of ours beside autodiff's."""
    dtypes = list(dict.fromkeys(dtype for leaf in leaves for dtype in leaf.errors))
    columns = [f"{dtype}: ours / autodiff" for dtype in dtypes]
    head = ("leaf", "shape", "largest difference", "relative", "at", *columns, "")
    rows = []
    for leaf in leaves:
        pairs = [leaf.errors.get(dtype) for dtype in dtypes]
        rows.append(
            (
                _code(leaf.path),
                _shape(leaf.shape),
                _number(leaf.difference),
                _number(leaf.relative),
                ", ".join(map(str, leaf.where)),
                *(f"{_number(pair[0])} / {_number(pair[1])}" if pair else "" for pair in pairs),
                _badge(leaf.agrees, "agrees", "DIFFERS")
                + (f" {escape(leaf.cause.message)}" if leaf.cause else ""),
            )
        )
    notes = "".join(f"<p>{escape(leaf.not_finite)}</p>" for leaf in leaves if leaf.not_finite)
    return _table("Leaf by leaf", head, rows) + notes


def _maps(leaves: Iterable[tuple[str, bool, np.ndarray, np.ndarray]]) -> str:
    """A heat map for each leaf that differs; those of the others are rounding, and folded away."""
    shown: dict[bool, list[str]] = {True: [], False: []}
    for path, agrees, ours, truth in sorted(leaves, key=lambda leaf: leaf[1]):
        picture = heat_map(ours, truth)
        if picture is not None and len(shown[True]) + len(shown[False]) < PICTURES:
            shown[agrees].append(_figure(path, picture))
    legend = (
        f"<p>{_swatch('rgb(37 99 235)')} too large, {_swatch('rgb(217 95 2)')} too small, "
        f"{_swatch('rgb(190 24 93)')} not finite; the stronger, the further off. The last axis "
        "runs to the right, all others downwards. Of a large leaf a cell stands for several "
        "elements, and shows the largest difference in them.</p>"
    )
    wrong, right = ("".join(shown[agrees]) for agrees in (False, True))
    return (
        f'<h3>Where they differ</h3>{legend}<div class="maps">{wrong}</div>' if wrong else ""
    ) + (
        "<details><summary>Rounding in the leaves that agree, each on its own scale</summary>"
        f'{"" if wrong else legend}<div class="maps">{right}</div></details>'
        if right
        else ""
    )


def _figure(path: str, picture: HeatMap) -> str:
    cell = max(3, min(16, 4 * MOST // max(picture.rows, picture.columns)))
    height = max(16, cell * picture.rows)  # of a vector, too, something can be seen
    text = escape(picture.description)
    return (
        f'<figure><img src="{picture.uri}" width="{cell * picture.columns}" '
        f'height="{height}" alt="{escape(path)}: {text}">'
        f"<figcaption>{_code(path)}: {text}</figcaption></figure>"
    )


def _costs(cost: Cost | None) -> str:
    if cost is None:
        return ""
    head = ("", "time", "temporary memory", "floating-point operations", "kept for the backward")
    rows = []
    for name, side in (("hand-written", cost.manual), ("automatic", cost.automatic)):
        kept = [f"{_code(path)} {sized(float(size))}" for path, size in side.residual_bytes.items()]
        total = sized(float(sum(side.residual_bytes.values())))
        rows.append(
            (
                name,
                f"{side.milliseconds:.3g} ms",
                "unknown" if side.temporary_bytes is None else sized(float(side.temporary_bytes)),
                "unknown" if side.flops is None else f"{side.flops:.4g}",
                total + (f" ({', '.join(kept)})" if kept else ""),
            )
        )
    ratios = (cost.flops_ratio, cost.residual_ratio)
    flops, residuals = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    rows.append(("ratio", f"{cost.time_ratio:.2f}", "", flops, residuals))
    return _table("What it costs", head, rows)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are HTML already."""
    if not rows:
        return ""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<h3>{escape(title)}</h3><div class="wide"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _items(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    return f"<h3>{escape(title)}</h3><ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _folded(summary: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    lines = "".join(f"<li>{item}</li>" for item in items)
    return f"<details><summary>{escape(summary)}</summary><ul>{lines}</ul></details>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _number(value: float) -> str:
    return f"{value:.1e}"


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background: {colour}" aria-hidden="true"></span>'
