"""What a pipeline can do at best, from stage passes and hops that were measured alone. Pure; times in seconds.

A pass is one stage computing one step. `Passes` are those of every stage of a plan, in order, for the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

Passes = Sequence[float]


def token_s(passes: Passes, hops_s: float) -> float:
    """One user's time per token: each stage once, and the hops into every stage and back to the coordinator."""
    return sum(passes) + hops_s


def steady_tokens_s(passes: Passes, rows: int) -> float:
    """Tokens a second of a full pipeline that decodes `rows` sequences in each of its steps: the slowest stage never
    waits."""
    return rows / max(passes)


def load_tokens_s(
    *, users: int, prompt_tokens: int, output_tokens: int, decode: Passes, decode_rows: int, prefill: Passes, chunk: int
) -> float:
    """Tokens a second over a whole load: every prompt prefilled in chunks (`prefill` are their passes), then each
    sequence's other tokens decoded in a full pipeline. The stages share both kinds of work as the plan cut them, and
    the slowest never waits."""
    chunks = users * prompt_tokens / chunk
    steps = users * (output_tokens - 1) / decode_rows
    busy = [chunks * p + steps * d for p, d in zip(prefill, decode, strict=True)]
    return users * output_tokens / max(busy)


def prompt_s(passes: Passes, prompt_tokens: int, chunk: int, hops_s: float) -> float:
    """A prompt's time to its first token, cut into equal chunks that follow one another through the stages: every
    chunk on the slowest stage, and the first one on the others. `passes` are those of a chunk in the middle of the
    prompt, so that attention to what came before counts on average."""
    chunks = -(-prompt_tokens // chunk)
    share = prompt_tokens / (chunks * chunk)  # the last chunk may be shorter
    slowest = max(passes)
    return chunks * share * slowest + sum(passes) - slowest + hops_s


def shared_prompts_s(users: int, prompt_tokens: int, prefill_tokens_s: float) -> float:
    """When prompts that came at once are all through, if the prefill rate is shared perfectly."""
    return users * prompt_tokens / prefill_tokens_s
