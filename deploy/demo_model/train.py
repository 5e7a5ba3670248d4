"""Trains Potluck's built-in model from nothing and writes it as a model folder.

    python deploy/demo_model/train.py --out DIR --seed 0

Owns the model's shape and the training loop. The text comes from corpus.py, the tokenizer from tokens.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import corpus
import facts
import tokens
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

STEPS: Final = 2200
TOKENS_PER_STEP: Final = 2048
POOL: Final = 2048
PEAK_LEARNING_RATE: Final = 2e-3
WARMUP_STEPS: Final = 100
STATEMENT_SHARE: Final = 0.08


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    # Every width is a multiple of 64, so that group-wise quantisation of any format divides it.
    config = Qwen3Config(
        vocab_size=tokens.VOCABULARY,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=facts.LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokens.CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(tokens.END),
        pad_token_id=tokenizer.convert_tokens_to_ids(tokens.END_OF_TEXT),
        initializer_range=0.05,
        # Faster than the fused kernels for conversations of a hundred tokens.
        attn_implementation="eager",
    )
    return Qwen3ForCausalLM(config)


def batches(encoder: tokens.Encoder, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of (ids, weights), padded on the right; a weight is how much that token counts.

    Examples of like length share a batch. Padding comes after everything that is judged, and attention is
    causal, so no mask is needed. RoPE sees only distances, so positions may always start at zero.
    """
    rng = random.Random(f"batches {seed}")  # noqa: S311 - practice text, no secret
    talks = corpus.training_conversations(seed)
    while True:
        pool = [
            encoder.statement(rng) if rng.random() < STATEMENT_SHARE else encoder.conversation(next(talks))
            for _ in range(POOL)
        ]
        pool.sort(key=lambda example: len(example.ids))
        groups: list[list[tokens.Example]] = [[]]
        for example in pool:
            if len(example.ids) * (len(groups[-1]) + 1) > TOKENS_PER_STEP:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(example.ids) for example in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            weights = torch.zeros(len(group), width)
            for row, example in enumerate(group):
                ids[row, : len(example.ids)] = torch.tensor(example.ids)
                weights[row, : len(example.ids)] = torch.tensor(example.weights)
            yield ids, weights


def loss_of(model: Qwen3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy; the head is applied only where a token counts."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    counts = weights[:, 1:] > 0
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[counts]), ids[:, 1:][counts], reduction="none")
    weight = weights[:, 1:][counts]
    return (losses * weight).sum() / weight.sum()


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Qwen3ForCausalLM, encoder: tokens.Encoder, *, seed: int, steps: int) -> None:
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    started, recent, seen = time.monotonic(), 0.0, 0
    for step, (ids, weights) in enumerate(itertools.islice(batches(encoder, seed), steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent, seen = recent + loss.item(), seen + ids.numel()
        if (step + 1) % 50 == 0:
            elapsed_s = time.monotonic() - started
            left_s = elapsed_s / (step + 1) * (steps - step - 1)
            print(
                f"step {step + 1}/{steps}  loss {recent / 50:.4f}  {seen / elapsed_s:.0f} tok/s  "
                f"{elapsed_s:.0f} s, {left_s:.0f} s left",
                flush=True,
            )
            recent = 0.0


def write(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.to(torch.bfloat16)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (tokens.END, tokens.END_OF_TEXT)]
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.convert_tokens_to_ids(tokens.END_OF_TEXT)
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", tokens.TOKENIZER_CONFIG)
    # Readers older than transformers 5 look for the rope base here, and silently take their own otherwise.
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    _write_json(out / "config.json", config)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train Potluck's built-in model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="of the text, its order and the initial weights")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2; 1 is faster on a busy machine)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = tokens.train_tokenizer(arguments.seed)
    model = new_model(tokenizer)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, {parameters * 2 / 1e6:.1f} MB in bf16", flush=True)
    started = time.monotonic()
    train(model, tokens.Encoder(tokenizer), seed=arguments.seed, steps=arguments.steps)
    write(model, tokenizer, arguments.out)
    print(f"wrote {arguments.out} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
