"""Small real tokenizers of the two kinds that models use: byte-level BPE, and SentencePiece-like with byte fallback."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

END = "<|end|>"
THINK = "<think>"  # an added token that is shown


@lru_cache(maxsize=1)
def byte_level() -> tokenizers.Tokenizer:
    """All of UTF-8 as bytes, a few merges that cut characters in odd places, two added tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [
        "hello world, hello words, the world says hello",
        "你好世界你好",
        "naïve café — déjà vu 🙂🙃🙂",
        "stop the stops",
    ]
    backend.train_from_iterator(
        texts * 4,
        trainers.BpeTrainer(
            vocab_size=360,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[END],
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken(THINK, special=False)])
    return backend


@lru_cache(maxsize=1)
def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 has it: spaces are U+2581, unknown characters fall back to bytes, the leading space is not decoded."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzé", "▁a", "▁t", "he", "▁the"]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def metaspace(prepend: Literal["always", "first", "never"]) -> tokenizers.Tokenizer:
    """As T5 and other Unigram models have it: words begin with U+2581, which may stand within a token, too."""
    pieces = ["<unk>", "▁", *"abcé你🙂", "▁a", "▁the", "ab▁c", "▁▁"]
    backend = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend)
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


def word_pieces() -> tokenizers.Tokenizer:
    """As BERT has it: what goes on with a word begins with ##, and no space stands before a full stop."""
    vocabulary = {piece: at for at, piece in enumerate(["[UNK]", "a", "##b", ".", "the", "'", "s", "你"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    return backend
