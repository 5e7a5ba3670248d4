"""The two kinds of tokenizers that GGUF files hold, built of their vocabularies.

`gpt2`: byte-level BPE with merges in the file, and the name of the expression that splits words. `llama`:
SentencePiece's BPE, whose merges follow from its pieces' scores. Knows no special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cluster.errors import ModelError

_NORMAL, _BYTE = 1, 6
_SPACE: Final = "▁"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a file lists. An id is a place in these lists."""

    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """How a byte-level tokenizer cuts a text before it merges."""

    expression: str | None  # None: GPT-2's own
    single_digits: bool = False
    composes: bool = False  # characters are composed first (NFC)
    takes_whole: bool = False  # a word that is a token is not merged from its parts
    adds_first: bool = False  # the beginning-of-text token, where a file does not say


_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")

_GPT2 = Split(None)
_LLAMA3 = Split(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}", takes_whole=True, adds_first=True)
_QWEN2 = Split(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_TAIL}", composes=True)
_TEKKEN = Split(rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED_TAIL}", takes_whole=True, adds_first=True)
_GPT4O = Split(
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED_TAIL}",
)

SPLITS: Final = {
    "gpt-2": _GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    # The same expression; words are always merged from their parts.
    "smaug-bpe": Split(_LLAMA3.expression),
    "dbrx": Split(_LLAMA3.expression),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
    "smollm": Split(None, single_digits=True),
}
"""`tokenizer.ggml.pre`. A file without it, or with `default`, does not say how words are split."""


def byte_level(vocabulary: Vocabulary, split: Split) -> Tokenizer:
    """Byte-level BPE. The library raises when merges and tokens do not fit."""
    backend = Tokenizer(
        models.BPE(
            {token: id for id, token in enumerate(vocabulary.tokens)},
            [_parts(merge) for merge in vocabulary.merges],
            ignore_merges=split.takes_whole,
        )
    )
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if split.single_digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    if split.expression is not None:
        cuts.append(pre_tokenizers.Split(Regex(split.expression), behavior="isolated", invert=False))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.expression is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    if split.composes:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def pieces(vocabulary: Vocabulary, unknown: str | None, prefixed: bool) -> Tokenizer:
    """SentencePiece's BPE. `prefixed`: every stretch of text is taken as if a space stood before it."""
    has_bytes = _BYTE in vocabulary.kinds
    backend = Tokenizer(
        models.BPE(
            {token: id for id, token in enumerate(vocabulary.tokens)},
            list(_merges(vocabulary)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    as_sign = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), as_sign]) if prefixed else as_sign
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefixed else back)
    return backend


def _parts(merge: str) -> tuple[str, str]:
    """The first character may be a space itself."""
    at = merge.find(" ", 1)
    if at < 0:
        raise ModelError(f"the merge {merge!r:.40} has no two parts; download the model again")
    return merge[:at], merge[at + 1 :]


def _merges(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first: SentencePiece merges whichever neighbours make the
    piece with the highest score. Of several ways to make the same piece in the same place only one is ever open."""
    normal = {
        token: score
        for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, vocabulary.scores, strict=True)
        if kind == _NORMAL
    }
    found = [
        (score, token, at)
        for token, score in normal.items()
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    for _, token, at in sorted(found, key=lambda item: -item[0]):
        yield token[:at], token[at:]
