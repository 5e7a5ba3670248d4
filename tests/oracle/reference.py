"""The single-process reference for torch: the whole model by `transformers`, and when it may be believed.

A comparison proves something only if it could have failed. A greedy continuation is therefore a reference only
when its best id always wins by far more than rounding could change, and when it does not run in circles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.checkpoints import SPECIALS, VOCABULARY
from tests.oracle import ledger

GAP_TOLERANCES = 20
LAST_TOKENS = 32
DISTINCT_MIN = 8


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt, its greedy continuation and the logits that each token was drawn from."""

    prompt: list[int]
    ids: list[int]
    logits: npt.NDArray[np.float32]
    judge: str = "transformers"


def assert_same(ids: Sequence[int], logits: npt.NDArray[np.float32], reference: Reference, *, tolerance: float) -> None:
    """The check that mutants have to fail: `ids`, and the logits that they were drawn from, begin the continuation.
    Where it is long enough to be decisive, the pipeline that ran last is entered in the ledger."""
    np.testing.assert_allclose(logits, reference.logits[: len(logits)], rtol=0, atol=tolerance)
    assert list(ids) == reference.ids[: len(ids)]
    if len(ids) >= LAST_TOKENS:
        ledger.equalled(reference.judge, tolerance)


def check_reference(gaps: Sequence[float], ids: Sequence[int], tolerance: float) -> None:
    """Raise ValueError unless the continuation is decisive and varied enough to compare with."""
    if len(gaps) != len(ids) or len(ids) < LAST_TOKENS:
        raise ValueError(f"expected at least {LAST_TOKENS} tokens with a gap each, found {len(ids)} and {len(gaps)}")
    if min(gaps) < GAP_TOLERANCES * tolerance:
        raise ValueError(f"the smallest top-two gap is {min(gaps):.2g}, below {GAP_TOLERANCES} x {tolerance:.2g}")
    if (distinct := len(set(ids[-LAST_TOKENS:]))) < DISTINCT_MIN:
        raise ValueError(f"the last {LAST_TOKENS} tokens hold {distinct} different ids, fewer than {DISTINCT_MIN}")


def top_two_gaps(logits: npt.NDArray[np.float32]) -> list[float]:
    """How far the best id is ahead of the second, for each row."""
    ordered = np.sort(logits, axis=-1)
    return [float(gap) for gap in ordered[:, -1] - ordered[:, -2]]


def random_prompt(length: int, seed: int) -> list[int]:
    """Ordinary token ids, no special ones."""
    generator = np.random.default_rng(seed)
    return [int(token) for token in generator.integers(len(SPECIALS), VOCABULARY, size=length)]


class WholeModel:
    """The model in `folder` as `transformers` runs it in one process."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()

    def in_float32(self) -> WholeModel:
        """The same weights, computed in float32; what this object was is gone."""
        self._model = self._model.float()
        return self

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter as `transformers` loads it, tied ones once."""
        return dict(self._model.named_parameters())

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """After each token, in one forward without a cache."""
        return self._model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> Reference:
        """The library's own greedy generation; end-of-sequence ids do not end it."""
        from transformers import GenerationConfig

        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        inputs = torch.tensor([prompt])
        output = self._model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
        logits = torch.cat(output.logits).float().numpy()
        return Reference(list(prompt), output.sequences[0, len(prompt) :].tolist(), logits)


def decisive_reference(
    model: WholeModel, *, prompt_tokens: int, count: int, tolerance: float, seeds: range = range(64)
) -> Reference:
    """The continuation of the first random prompt that passes `check_reference`."""
    for seed in seeds:
        reference = model.greedy(random_prompt(prompt_tokens, seed), count)
        try:
            check_reference(top_two_gaps(reference.logits), reference.ids, tolerance)
        except ValueError:
            continue
        return reference
    raise AssertionError(f"no prompt of {prompt_tokens} tokens with a seed in {seeds} gives a reference")
