"""How positions rotate queries and keys: GGUF's settings in the words of transformers.

Knows the settings alone, not the architectures that have them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.errors import ModelError
from coordinator.gguf.source import GgufFiles

_FREQUENCIES = "rope_freqs.weight"
_LOW, _HIGH = 1.0, 4.0  # of every Llama 3
_CONTEXTS = tuple(1 << bits for bits in range(9, 21))
_NEAR = 1e-4  # factors are float32; those of another rotation differ by far more


def scaling(files: GgufFiles, prefix: str, head_dim: int) -> dict[str, object] | None:
    """What transformers calls rope_scaling; None for a plain rotation."""
    facts, key = files.facts, f"{prefix}.rope.scaling"
    kind = facts.text(f"{key}.type", "none")
    facts.raw(f"{key}.finetuned")  # says that the model was trained so, which changes nothing
    stretch = files.vector(_FREQUENCIES)
    if stretch is not None:
        if kind != "none":
            raise ModelError(f"{facts.where}: states both {_FREQUENCIES} and {key}.type {kind!r:.20}; convert it again")
        return _llama3(files, prefix, stretch, head_dim)
    if kind == "none":
        return None
    factor = facts.number(f"{key}.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": facts.integer(f"{key}.original_context_length"),
            **_beta(files, key),
        }
    raise ModelError(f"{facts.where}: {key}.type is {kind!r:.40}; Potluck converts none, linear and yarn here")


def longrope(files: GgufFiles, prefix: str) -> tuple[dict[str, object] | None, int | None]:
    """Phi-3's factors for each pair of dimensions, and the context up to which the short ones hold."""
    facts, key = files.facts, f"{prefix}.rope.scaling"
    short, long = files.vector("rope_factors_short.weight"), files.vector("rope_factors_long.weight")
    if short is None or long is None:
        facts.raw(f"{key}.original_context_length")
        return None, None
    if not all(0 < factor < math.inf for factor in (*short, *long)):
        raise ModelError(f"{facts.where}: expected factors of the rotation above 0; download the file again")
    original, longest = facts.integer(f"{key}.original_context_length"), facts.integer(f"{prefix}.context_length")
    # transformers computes this from the two contexts, so it may only be repeated here.
    length = math.sqrt(1 + math.log(longest / original) / math.log(original)) if longest > original > 1 else 1.0
    if abs(facts.number(f"{key}.attn_factor", length) - length) > _NEAR * length:
        raise ModelError(f"{facts.where}: {key}.attn_factor does not follow from the contexts; convert the model again")
    return {"rope_type": "longrope", "short_factor": list(short), "long_factor": list(long)}, original


def _beta(files: GgufFiles, key: str) -> dict[str, object]:
    named = {"beta_fast": f"{key}.yarn_beta_fast", "beta_slow": f"{key}.yarn_beta_slow"}
    return {name: files.facts.number(there) for name, there in named.items() if there in files.facts}


def _llama3(files: GgufFiles, prefix: str, stretch: Sequence[float], head_dim: int) -> dict[str, object]:
    """The settings from which the factors in the file follow. Only these were kept, so they are compared with what
    each possible context gives; other settings of this rotation have not been published."""
    facts, factor = files.facts, max(stretch)
    theta = facts.number(f"{prefix}.rope.freq_base", 10_000.0)
    if len(stretch) == head_dim // 2 and all(1 <= one < math.inf for one in stretch) and theta > 1:
        stated = facts.integer(f"{prefix}.rope.scaling.original_context_length", 0)
        for original in (stated,) if stated else _CONTEXTS:
            expected = _llama3_factors(theta, head_dim, factor, original)
            if all(abs(one - other) <= _NEAR * other for one, other in zip(stretch, expected, strict=True)):
                return {
                    "rope_type": "llama3",
                    "factor": float(factor),
                    "low_freq_factor": _LOW,
                    "high_freq_factor": _HIGH,
                    "original_max_position_embeddings": original,
                }
    raise ModelError(
        f"{facts.where}: {_FREQUENCIES} holds factors that no Llama 3 rotation of {head_dim} dimensions gives; "
        "use a version of this model in safetensors"
    )


def _llama3_factors(theta: float, head_dim: int, factor: float, original: int) -> list[float]:
    """By how much Llama 3 slows each pair of dimensions: not below a wavelength, wholly above another."""
    factors = []
    for pair in range(head_dim // 2):
        turns = original / (2 * math.pi * theta ** (2 * pair / head_dim))  # within the original context
        kept = min(max((turns - _LOW) / (_HIGH - _LOW), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept))
    return factors
