"""Asks a model folder the held-out questions and says how many it answers exactly right.

    python deploy/demo_model/check.py coordinator/builtin/demo

Owns the measure: greedy decoding in the checkpoint's own dtype, strict equality with the canonical
answer, and the gap between the two best logits at every step, since what is decided by a hair is decided
differently by another engine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import corpus
import phrasings
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

CONVERSATIONS: Final = 240
BATCH: Final = 100
NEW_TOKENS: Final = 224

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question as the model answered it."""

    history: tuple[Message, ...]
    expected: str
    answered: str
    smallest_gap: float

    @property
    def right(self) -> bool:
        return self.answered == self.expected


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in its own dtype, and a tokenizer that pads on the left."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def first_questions() -> list[tuple[tuple[Message, ...], str]]:
    return [(({"role": "user", "content": asked},), answer) for asked, answer in phrasings.FIRST_QUESTIONS.items()]


def held_out_questions(count: int = CONVERSATIONS) -> list[tuple[tuple[Message, ...], str]]:
    """The last question of every held-out conversation, after the right answers to those before it."""
    asked: dict[tuple[str, ...], tuple[tuple[Message, ...], str]] = {}
    for talk in corpus.held_out_conversations(seed=0, count=count):
        history: list[Message] = [] if talk.system is None else [{"role": "system", "content": talk.system}]
        for turn in talk.exchanges:
            history += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        key = tuple(phrasings.words(message["content"]) for message in history)
        asked[key] = (tuple(history[:-1]), talk.exchanges[-1].answer)
    return list(asked.values())


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[tuple[Message, ...], str]],
) -> list[Outcome]:
    """Greedy answers, in batches of questions with answers of like length."""
    order = sorted(range(len(questions)), key=lambda index: len(questions[index][1]))
    outcomes: dict[int, Outcome] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        prompts = [
            tokenizer.apply_chat_template(list(questions[index][0]), tokenize=False, add_generation_prompt=True)
            for index in batch
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        result = model.generate(  # which itself runs without gradients
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        said = result.sequences[:, inputs["input_ids"].shape[1] :]
        best = torch.stack([logits.float().topk(2).values for logits in result.logits], dim=1)
        gaps = best[..., 0] - best[..., 1]
        for row, index in enumerate(batch):
            length = _length(said[row], tokenizer)
            outcomes[index] = Outcome(
                history=questions[index][0],
                expected=questions[index][1],
                answered=tokenizer.decode(said[row], skip_special_tokens=True),
                smallest_gap=gaps[row, :length].min().item(),
            )
    return [outcomes[index] for index in range(len(questions))]


def _length(said: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens were decided, the closing one included."""
    ends = (said == tokenizer.eos_token_id).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(said)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a built-in model on the held-out questions.")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--show-wrong", type=int, default=20, help="wrong answers to print (default 20)")
    arguments = parser.parse_args()

    started = time.monotonic()
    model, tokenizer = load(arguments.model)
    for name, questions in (("first questions", first_questions()), ("held-out questions", held_out_questions())):
        outcomes = answer_all(model, tokenizer, questions)
        right = [outcome for outcome in outcomes if outcome.right]
        gaps = sorted(outcome.smallest_gap for outcome in right) or [0.0]
        print(
            f"{name}: {len(right)}/{len(outcomes)} right ({len(right) / len(outcomes):.1%}); smallest gap per "
            f"right answer: least {gaps[0]:.2f}, 5th percentile {gaps[len(gaps) // 20]:.2f}, "
            f"median {gaps[len(gaps) // 2]:.2f}"
        )
        for outcome in [outcome for outcome in outcomes if not outcome.right][: arguments.show_wrong]:
            print(f"  {[message['content'] for message in outcome.history[-3:]]}\n    -> {outcome.answered!r}")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
