"""Draws one token from logits; the same token on every engine, in every batch and at every replay.

Pure numpy, without state: everything comes from the logits, the sampling parameters and the sequence's token ids.
It knows nothing of text, plans or caches.

Order of what happens to the logits:
 1. banned ids become -inf;
 2. penalties: repetition over prompt and output as transformers does it (a positive logit is divided, a negative one
    multiplied), then presence and frequency over the output alone as OpenAI defines them;
 3. temperature 0: the highest logit, the lowest id among equals. Otherwise the logits are divided by it;
 4. top_k keeps the k highest; top_p keeps the smallest set of the highest that holds this share of what top_k kept;
    min_p keeps what is at least this fraction as probable as the best. The best token always stays;
 5. Gumbel-max: the highest of logit + noise, which draws from the softmax of what stayed.

The noise of a token comes from an integer hash of (seed, choice, position, purpose, token id), never from a stream
of random numbers, so it does not matter who else is in the batch or what was drawn before. Two engines whose logits
differ by 1e-5 disagree only where the two best sums are closer than that; an inverse CDF would disagree wherever
rounding anywhere in the vocabulary moves the cumulated sum across the uniform number.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.errors import BadLogits
from cluster.steps import Draw, Sampling

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.uint64]
AnyFloats = npt.NDArray[np.float32] | Floats


class Purpose(enum.IntEnum):
    """What a random number is for: two purposes never share their noise. The numbers are part of the contract."""

    TOKEN = 0


BLOCK: Final = 16_384
"""Ids handled at a time: 128 KiB of float64 stay in cache, and temporaries stay below malloc's threshold for mapping
fresh pages (measured at 152,000 ids: 0.7 ms in blocks, 1.8 ms in one piece)."""

_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MULTIPLIER_1: Final = 0xBF58476D1CE4E5B9
_MULTIPLIER_2: Final = 0x94D049BB133111EB


def draw(logits: npt.NDArray[np.float32], draw: Draw, tokens: Sequence[int]) -> int:
    """Draw the token at position len(tokens). `logits` is one row; `tokens` is the sequence so far, prompt included."""
    if not np.isfinite(logits).all():
        bad = int(logits.size - np.isfinite(logits).sum())
        raise BadLogits(f"{bad} of {logits.size} logits at position {len(tokens)} are not finite numbers")
    sampling = draw.sampling
    scores = _adjusted(logits, draw, tokens)
    best = int(scores.argmax())
    if scores[best] == -np.inf:
        raise BadLogits(f"all {logits.size} tokens are banned at position {len(tokens)}")
    if sampling.temperature == 0.0:
        return best
    key = noise_key(sampling.seed, sampling.choice, len(tokens), Purpose.TOKEN)
    kept = _filtered(scores, sampling, float(scores[best]))
    return _gumbel_max(scores, kept, sampling.temperature, float(scores[best]), key)


def noise_key(seed: int, choice: int, position: int, purpose: Purpose) -> int:
    """Fold what is the same for the whole vocabulary into 64 bits. A negative seed counts modulo 2**64."""
    state = _mixed(seed)
    for part in (choice, position, purpose):
        state = _mixed(state ^ part)
    return state


def gumbel(key: int, ids: Ids) -> Floats:
    """Standard Gumbel noise for token ids: SplitMix64's output number `id` of the stream that begins at `key`.

    The uniform number is the hash's top 53 bits with the lowest one set, times 2**-53: never 0 and never 1, so the
    noise is finite.
    """
    state = ids + np.uint64(1)
    state *= np.uint64(_GOLDEN)
    state += np.uint64(key)
    shifted = state >> np.uint64(30)
    state ^= shifted
    state *= np.uint64(_MULTIPLIER_1)
    np.right_shift(state, np.uint64(27), out=shifted)
    state ^= shifted
    state *= np.uint64(_MULTIPLIER_2)
    np.right_shift(state, np.uint64(31), out=shifted)
    state ^= shifted
    state >>= np.uint64(11)
    state |= np.uint64(1)
    noise = state.astype(np.float64)
    noise *= 2.0**-53
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def _mixed(value: int) -> int:
    """SplitMix64's step and finaliser on a Python integer."""
    state = (value + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * _MULTIPLIER_1) & _MASK
    state = ((state ^ (state >> 27)) * _MULTIPLIER_2) & _MASK
    return state ^ (state >> 31)


@lru_cache(maxsize=4)
def _all_ids(size: int) -> Ids:
    ids = np.arange(size, dtype=np.uint64)
    ids.flags.writeable = False
    return ids


def _adjusted(logits: npt.NDArray[np.float32], draw: Draw, tokens: Sequence[int]) -> AnyFloats:
    """Apply bans and penalties. The logits themselves come back when there is nothing to apply."""
    sampling = draw.sampling
    over_output = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
    if not draw.banned and sampling.repetition_penalty == 1.0 and not over_output:
        return logits
    scores = logits.astype(np.float64)
    # An end-of-sequence id may lie outside a vocabulary that was cut down; it cannot be drawn anyway.
    scores[[token for token in draw.banned if 0 <= token < scores.size]] = -np.inf
    if sampling.repetition_penalty != 1.0:
        seen = np.flatnonzero(_counts(tokens, scores.size))
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = np.where(values < 0, values * penalty, values / penalty)
    if over_output:
        counts = _counts(tokens[draw.prompt_tokens :], scores.size)
        scores -= sampling.frequency_penalty * counts
        scores -= sampling.presence_penalty * (counts > 0)
    return scores


def _counts(tokens: Sequence[int], size: int) -> npt.NDArray[np.int64]:
    """How often each id occurs. Ids beyond the logits (rows of a padded embedding) have nothing to penalise."""
    return np.bincount(np.asarray(tokens, dtype=np.int64), minlength=size)[:size]


def _filtered(scores: AnyFloats, sampling: Sampling, best: float) -> Ids | None:
    """Ids that top_k, top_p and min_p keep, rising; None when nothing is filtered."""
    kept: npt.NDArray[np.intp] | None = None
    if 0 < sampling.top_k < scores.size:
        kept = _top_k(scores, sampling.top_k)
    if sampling.top_p < 1.0:
        kept = _top_p(scores, kept, sampling, best)
    if sampling.min_p > 0.0:
        floor = best + sampling.temperature * float(np.log(sampling.min_p))
        kept = np.flatnonzero(scores >= floor) if kept is None else kept[scores[kept] >= floor]
    return None if kept is None else kept.astype(np.uint64)


def _top_k(scores: AnyFloats, k: int) -> npt.NDArray[np.intp]:
    """Exactly k ids; among equals at the edge the lowest ids."""
    edge = np.partition(scores, scores.size - k)[scores.size - k]
    above = np.flatnonzero(scores > edge)
    equal = np.flatnonzero(scores == edge)[: k - above.size]
    return np.sort(np.concatenate((above, equal)))


def _top_p(
    scores: AnyFloats, kept: npt.NDArray[np.intp] | None, sampling: Sampling, best: float
) -> npt.NDArray[np.intp]:
    """The smallest set of the most probable ids whose share reaches top_p; the one that crosses it belongs to it."""
    values = scores if kept is None else scores[kept]
    shares = np.exp(_tempered(values, sampling.temperature, best))
    shares /= shares.sum()
    # What is rarer than (1 - top_p) / size adds up to less than 1 - top_p, so it lies outside: no need to sort it.
    likely = np.flatnonzero(shares >= (1.0 - sampling.top_p) / shares.size)
    order = likely[np.argsort(-shares[likely], kind="stable")]
    before = np.cumsum(shares[order]) - shares[order]
    count = max(1, int((before < sampling.top_p).sum()))
    nucleus = np.sort(order[:count])
    return nucleus if kept is None else kept[nucleus]


def _tempered(values: AnyFloats, temperature: float, best: float) -> Floats:
    """Logits over temperature, the best one at 0: a tiny temperature then overflows to -inf, never to inf or NaN."""
    tempered = values.astype(np.float64)
    tempered -= best
    with np.errstate(over="ignore"):
        tempered /= temperature
    return tempered


def _gumbel_max(scores: AnyFloats, kept: Ids | None, temperature: float, best: float, key: int) -> int:
    """The id with the highest sum of tempered logit and noise, block by block."""
    ids = _all_ids(scores.size) if kept is None else kept
    winner, winning = -1, -np.inf
    for begin in range(0, ids.size, BLOCK):
        block = ids[begin : begin + BLOCK]
        values = scores[begin : begin + BLOCK] if kept is None else scores[block]
        sums = _tempered(values, temperature, best)
        sums += gumbel(key, block)
        top = int(sums.argmax())
        if sums[top] > winning:
            winner, winning = int(block[top]), float(sums[top])
    return winner
