"""The tokenizer in a GGUF file's metadata, as the files that every other checkpoint has.

Owns: tokenizer.json and what belongs to it: special tokens, chat template, the tokens that end an answer. Built with
the `tokenizers` library. Knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, processors

from cluster.errors import ModelError
from coordinator.gguf.source import Metadata
from coordinator.gguf.vocabularies import SPLITS, Vocabulary, byte_level, pieces

_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4

_TOKEN_CHARS_MAX = 1024
"""The longest real ones are some 256 spaces or dashes. Every way to cut a token in two is looked at."""

_ENDS = frozenset(
    {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "<EOT>"}
)
"""Control tokens that end an answer wherever they exist; a file names only one or two of a model's."""

_HARMONY = frozenset({"<|return|>", "<|call|>"})
"""What ends an answer of gpt-oss, in which `<|end|>` stands between a thought and the answer."""

_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}

_TOP_K = "general.sampling.top_k"

_STRIPPING = "phi3"
"""Phi-3's own tokens swallow white space behind them. GGUF has no word for it, so it goes by architecture."""

_KEEPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""Phi-3's that do not."""


@dataclass(frozen=True, slots=True)
class _Special:
    """Ids with a meaning of their own; absent ones are None."""

    bos: int | None
    eos: int | None
    unknown: int | None
    pad: int | None
    ends: tuple[int, ...]

    def named(self, tokens: Sequence[str]) -> dict[str, str]:
        ids = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unknown, "pad_token": self.pad}
        return {name: tokens[id] for name, id in ids.items() if id is not None}


def tokenizer_files(facts: Metadata) -> Mapping[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json."""
    vocabulary = _vocabulary(facts)
    special = _special(facts, vocabulary)
    model = facts.text("tokenizer.ggml.model")
    try:
        if model == "gpt2":
            split = facts.text("tokenizer.ggml.pre", "default")
            if split not in SPLITS:
                known = ", ".join(sorted(SPLITS))
                raise ModelError(
                    f"{facts.where}: its tokenizer splits words as {split!r:.40}, which Potluck does not know; "
                    f"it knows {known}. Use a version of this model in safetensors"
                )
            adds_first = SPLITS[split].adds_first
            backend = byte_level(vocabulary, SPLITS[split])
        elif model == "llama":
            for key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"):
                if facts.raw(key):
                    raise ModelError(f"{facts.where}: {key} is set, which Potluck does not convert")
            adds_first = True
            unknown = vocabulary.tokens[special.unknown] if special.unknown is not None else None
            backend = pieces(vocabulary, unknown, facts.flag("tokenizer.ggml.add_space_prefix", True))
        else:
            raise ModelError(
                f"{facts.where}: its tokenizer is of kind {model!r:.40}; Potluck converts gpt2 (byte-level) and llama "
                "(SentencePiece). Use a version of this model in safetensors"
            )
        added = _added(facts, vocabulary)
        backend.add_tokens(list(added.values()))
        _surround(backend, facts, vocabulary, special, adds_first)
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception for what does not fit together
        raise ModelError(f"{facts.where}: its tokenizer does not hold together ({error}); download it again") from error
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special.named(vocabulary.tokens),
        "added_tokens_decoder": {str(id): _described(token) for id, token in added.items()},
    }
    if "tokenizer.chat_template" in facts:
        settings["chat_template"] = facts.text("tokenizer.chat_template")
    return {
        "tokenizer.json": str(backend.to_str()).encode(),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=1).encode(),
        "generation_config.json": json.dumps({"eos_token_id": list(special.ends)} | _recommended(facts)).encode(),
    }


def _recommended(facts: Metadata) -> dict[str, object]:
    """How the model's authors sample, in the words of transformers."""
    found: dict[str, object] = {name: facts.number(key) for name, key in _SAMPLING.items() if key in facts}
    return found | ({"top_k": facts.integer(_TOP_K)} if _TOP_K in facts else {})


def special_ids(facts: Metadata) -> dict[str, object]:
    """What a configuration repeats of them; a padding token that is none must not be another family's default."""
    special = _special(facts, _vocabulary(facts))
    return {
        "bos_token_id": special.bos,
        "eos_token_id": list(special.ends) or None,
        "pad_token_id": special.pad,
    }


def _vocabulary(facts: Metadata) -> Vocabulary:
    tokens = facts.texts("tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens) or not tokens:
        raise ModelError(f"{facts.where}: expected tokens that differ, found some twice or none; download it again")
    if max(map(len, tokens)) > _TOKEN_CHARS_MAX:
        raise ModelError(f"{facts.where}: a token has more than {_TOKEN_CHARS_MAX} characters; is this the right file?")
    kinds: tuple[int, ...] = (_NORMAL,) * len(tokens)
    if "tokenizer.ggml.token_type" in facts:
        kinds = facts.integers("tokenizer.ggml.token_type")
    scores: tuple[float, ...] = (0.0,) * len(tokens)
    if "tokenizer.ggml.scores" in facts:
        scores = facts.numbers("tokenizer.ggml.scores")
    if not len(tokens) == len(kinds) == len(scores):
        raise ModelError(f"{facts.where}: has {len(tokens)} tokens, {len(kinds)} kinds and {len(scores)} scores")
    merges = facts.texts("tokenizer.ggml.merges", ())
    return Vocabulary(tokens, kinds, scores, merges)


def _special(facts: Metadata, vocabulary: Vocabulary) -> _Special:
    def id_of(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in facts:
            return None
        found = facts.integer(key)
        if found >= len(vocabulary.tokens):
            raise ModelError(f"{facts.where}: {key} is {found}, but there are {len(vocabulary.tokens)} tokens")
        return found

    eos = id_of("eos")
    marks = {t: id for id, t in enumerate(vocabulary.tokens) if vocabulary.kinds[id] != _NORMAL}
    usual = (_ENDS - {"<|end|>"}) | _HARMONY if marks.keys() >= _HARMONY else _ENDS
    known = {id for token, id in marks.items() if token in usual}
    ends = {id for id in (eos, id_of("eot"), id_of("eom"), *known) if id is not None}
    unknown = id_of("unknown")
    if unknown is None and _UNKNOWN in vocabulary.kinds:
        unknown = vocabulary.kinds.index(_UNKNOWN)
    return _Special(id_of("bos"), eos, unknown, id_of("padding"), tuple(sorted(ends)))


def _added(facts: Metadata, vocabulary: Vocabulary) -> dict[int, AddedToken]:
    """Tokens that are recognised wherever they are written; control tokens are not shown. One that is written with the
    sign for a space can only be found where spaces have become that sign."""
    strips = facts.text("general.architecture", "") == _STRIPPING
    added = {}
    for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        if kind in (_UNKNOWN, _CONTROL, _USER) and token:
            added[id] = AddedToken(
                token,
                special=kind != _USER,
                normalized=kind == _USER and "▁" in token,
                rstrip=strips and token not in _KEEPING,
            )
    return added


def _described(token: AddedToken) -> dict[str, object]:
    return {
        "content": token.content,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized,
        "single_word": token.single_word,
        "special": token.special,
    }


def _surround(backend: Tokenizer, facts: Metadata, vocabulary: Vocabulary, special: _Special, adds_first: bool) -> None:
    """What stands before and behind a text that is encoded by itself."""
    before = special.bos if facts.flag("tokenizer.ggml.add_bos_token", adds_first) else None
    behind = special.eos if facts.flag("tokenizer.ggml.add_eos_token", False) else None
    around = {vocabulary.tokens[id]: id for id in (before, behind) if id is not None}
    if around:
        single = ["$A"]
        single = [vocabulary.tokens[before], *single] if before is not None else single
        single = [*single, vocabulary.tokens[behind]] if behind is not None else single
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(around.items()))
