"""What answers amount to: percentiles, rates, and how busy the stages were meanwhile. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from cluster.cli.bench_client import Answer


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of an endpoint: `users` at once, each `rounds` times."""

    users: int
    prompt_tokens: int
    output_tokens: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles, in seconds."""

    p50_s: float
    p95_s: float
    p99_s: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None when nothing was measured."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(*(_percentile(ordered, share) for share in (0.50, 0.95, 0.99)))


@dataclass(frozen=True, slots=True)
class Inside:
    """What only a Potluck endpoint tells of itself."""

    busy: tuple[float, ...]  # share of the time that each stage computed
    hops_s: float | None  # of a token's time, on links and event loops; None where no step was without a prompt's chunk
    bytes_per_token: int  # of its hidden states, over all links between stages


@dataclass(frozen=True, slots=True)
class Result:
    """One load on one endpoint."""

    endpoint: str
    load: Load
    requests: int
    problems: tuple[str, ...]  # of the requests without a whole answer
    prompt_tokens: float  # as the endpoint counted them, on average
    cached_tokens: float
    tokens: int
    wall_s: float
    first: Spread | None
    gap: Spread | None
    user_tokens_s: float | None  # the median user's, once tokens come
    inside: Inside | None = None

    @property
    def output_tokens(self) -> float:
        """Of an answer, on average, as they came."""
        return self.tokens / self.requests

    @property
    def tokens_s(self) -> float:
        """Received by all users together, from the first request to the last token."""
        return self.tokens / self.wall_s if self.wall_s > 0 else 0.0


def measure(endpoint: str, load: Load, answers: Sequence[Answer], inside: Inside | None) -> Result:
    whole = [answer for answer in answers if not answer.problem]
    rates = [answer.tokens_s for answer in whole if answer.tokens_s is not None]
    return Result(
        endpoint=endpoint,
        load=load,
        requests=len(answers),
        problems=tuple(answer.problem for answer in answers if answer.problem),
        prompt_tokens=fmean(answer.prompt_tokens for answer in whole) if whole else 0.0,
        cached_tokens=fmean(answer.cached_tokens for answer in whole) if whole else 0.0,
        tokens=sum(answer.tokens for answer in answers),
        wall_s=max(answer.ended_s for answer in answers) - min(answer.began_s for answer in answers),
        first=Spread.of([answer.first_s for answer in whole if answer.first_s is not None]),
        gap=Spread.of([gap_s for answer in whole for gap_s in answer.gaps_s]),
        user_tokens_s=median(rates) if rates else None,
        inside=inside,
    )


def inside(before: Mapping[str, object] | None, after: Mapping[str, object] | None, wall_s: float) -> Inside | None:
    """From two pictures of `/potluck/status` around a load; None where the plan changed or the endpoint has no such."""
    plan, load, earlier = _part(after, "plan"), _part(after, "load"), _part(before, "load")
    if plan is None or load is None or earlier is None or wall_s <= 0:
        return None
    now_s, then_s = load.get("stages_busy_s"), earlier.get("stages_busy_s")
    width = plan.get("boundary_bytes")
    if not isinstance(now_s, list) or not isinstance(then_s, list) or not isinstance(width, int):
        return None
    if len(now_s) != len(then_s) or any(now < then for now, then in zip(now_s, then_s, strict=True)):
        return None  # another plan counts from zero
    return Inside(
        busy=tuple(min(1.0, (now - then) / wall_s) for now, then in zip(now_s, then_s, strict=True)),
        hops_s=_mean_hops_s(earlier, load),
        bytes_per_token=width * (len(now_s) - 1),
    )


def _mean_hops_s(earlier: Mapping[str, object], load: Mapping[str, object]) -> float | None:
    """Of the decode steps between two pictures."""
    steps, hops_s = ([part.get(name) for part in (earlier, load)] for name in ("decode_steps", "decode_hops_s"))
    match steps, hops_s:
        case [int(first), int(last)], [float(then_s), float(now_s)] if last > first:
            return (now_s - then_s) / (last - first)
    return None


def _part(status: Mapping[str, object] | None, name: str) -> Mapping[str, object] | None:
    found = status.get(name) if status else None
    return found if isinstance(found, dict) else None


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest values, in proportion."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
