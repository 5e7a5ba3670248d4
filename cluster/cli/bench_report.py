"""A benchmark's results: a table for people, a document for scripts, a page with plots."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Sequence

from rich.console import Console

from cluster.cli.bench_measures import Result, Spread

_COLUMNS = (
    ("endpoint", 12), ("users", 5), ("prompt", 6), ("out", 5), ("TTFT p50", 9), ("p95", 8), ("gap p50", 8), ("p95", 8),
    ("p99", 8), ("tok/s", 8), ("each", 7),
)  # fmt: skip

_SHORT = 0.98
"""Of the tokens that were asked for: below it rates are not those of answers of that length."""

_COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706", "#475569")
_WIDTH, _HEIGHT, _MARGIN = 460, 260, 50


class Table:
    """Printed line by line: a benchmark takes long, and the first numbers are worth having."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun = False

    def add(self, result: Result) -> None:
        if not self._begun:
            self._print("  ".join(f"{name:>{width}}" for name, width in _COLUMNS))
        self._begun = True
        load, first, gap = result.load, result.first, result.gap
        cells = [
            result.endpoint[:12], str(load.users), f"{result.prompt_tokens:.0f}", f"{result.output_tokens:.0f}",
            *_spread(first)[:2], *_spread(gap), f"{result.tokens_s:.1f}",
            "-" if result.user_tokens_s is None else f"{result.user_tokens_s:.1f}",
        ]  # fmt: skip
        self._print("  ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)))
        if not result.problems and result.output_tokens < _SHORT * load.output_tokens:
            self._print(f"{'':>12}  answers ended before the {load.output_tokens} tokens that were asked for")
        if result.cached_tokens >= 1:
            self._print(f"{'':>12}  of a prompt's tokens {result.cached_tokens:.0f} came from a cache")
        if result.inside is not None:
            busy = ", ".join(f"{share:.0%}" for share in result.inside.busy)
            hops = "" if result.inside.hops_s is None else f", {1000 * result.inside.hops_s:.2f} ms of a token on hops"
            self._print(f"{'':>12}  stages busy {busy}{hops}, {result.inside.bytes_per_token} bytes a token on links")
        for problem in dict.fromkeys(result.problems):
            self._print(f"{'':>12}  ! {result.problems.count(problem)} of {result.requests} failed: {problem}")

    def end(self) -> None:
        self._print("TTFT: time to the first token. gap: between two events of one answer. tok/s: all users together; ")
        self._print("each: the median user's, once tokens come. Times in milliseconds; tokens as the endpoint counts.")

    def _print(self, line: str) -> None:
        self._console.print(line.rstrip(), markup=False, soft_wrap=True)


def document(results: Sequence[Result], seed: int) -> str:
    """One JSON document; units are in the names. The seed asks for the same prompts again."""
    rows = [
        {**dataclasses.asdict(result), "tokens_s": result.tokens_s, "output_tokens": result.output_tokens}
        for result in results
    ]
    return json.dumps({"seed": seed, "results": rows})


def page(results: Sequence[Result]) -> str:
    """One HTML file that needs nothing else: throughput and time to the first token over the number of users."""
    loads = dict.fromkeys((result.load.prompt_tokens, result.load.output_tokens) for result in results)
    parts = []
    for prompt, output in loads:
        chosen = [r for r in results if (r.load.prompt_tokens, r.load.output_tokens) == (prompt, output)]
        parts.append(f"<h2>{prompt} tokens in, {output} out</h2>")
        parts.append(_plot("tokens a second, all users", chosen, lambda r: r.tokens_s))
        parts.append(_plot("median time to the first token, s", chosen, lambda r: r.first.p50_s if r.first else None))
    style = "body{font:14px system-ui,sans-serif;margin:2em;color:#1e293b}svg{margin-right:2em}"
    return f"<!doctype html><meta charset=utf-8><title>potluck bench</title><style>{style}</style>{''.join(parts)}\n"


def _plot(title: str, results: Sequence[Result], value: Callable[[Result], float | None]) -> str:
    """Lines over the number of users, one for each endpoint, both axes from zero."""
    points = {
        name: [(r.load.users, y) for r in results if r.endpoint == name and (y := value(r)) is not None]
        for name in dict.fromkeys(result.endpoint for result in results)
    }
    everything = [point for line in points.values() for point in line]
    right = max((x for x, _ in everything), default=1)
    top = max((y for _, y in everything), default=1.0) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        inner_width, inner_height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
        return _MARGIN + inner_width * x / right, _HEIGHT - _MARGIN - inner_height * y / top

    (left_px, bottom_px), (right_px, top_px) = at(0, 0), at(right, top)
    shapes = [
        f'<text x="{left_px}" y="20" font-weight="bold">{html.escape(title)}</text>',
        f'<path d="M{left_px},{top_px}V{bottom_px}H{right_px}" fill="none" stroke="#94a3b8"/>',
        f'<text x="{left_px - 6}" y="{top_px + 4}" text-anchor="end">{top:.3g}</text>',
        f'<text x="{right_px}" y="{bottom_px + 18}" text-anchor="end">{right} users</text>',
    ]
    for index, (name, line) in enumerate(points.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        spots = [at(x, y) for x, y in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        label_px = _HEIGHT - 12
        shapes.append(f'<text x="{left_px + 110 * index}" y="{label_px}" fill="{colour}">{html.escape(name)}</text>')
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}">{"".join(shapes)}</svg>'


def _spread(spread: Spread | None) -> tuple[str, str, str]:
    return ("-", "-", "-") if spread is None else (_ms(spread.p50_s), _ms(spread.p95_s), _ms(spread.p99_s))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"
