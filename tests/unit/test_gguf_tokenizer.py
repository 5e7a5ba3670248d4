"""A tokenizer from GGUF metadata gives the ids that the original one gives."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cluster.errors import ModelError
from coordinator.gguf.source import Metadata
from coordinator.gguf.tokenizer import special_ids, tokenizer_files
from coordinator.text.model import SamplingDefaults, TextModel, load_text_model

TEXTS = (
    "The kettle's on; they'll bring 1234567 buns, WON'T they?",
    "  two  spaces\tand a tab \n\n\nlines \r\n end   ",
    "naïve café — déjà vu 🙂🙃 你好，世界 ПриВЕТ мир",
    "cafe\u0301 e\u0301 \u1100\u1161 \ufb01ne",
    "def f(x):\n    return x//2 + x**3  # HTTPServer2024 iPhone's I'M",
    "<|user|>Hello<|end|><|assistant|> <think>hm</think>",
    "a<think>b <think> c",
    "3.14159, 1,000,000 and ⅷ or ½",
    " ",
    "",
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|begin|>", "<|user|>", "<|assistant|>", "<|end|>")
CORPUS = [*TEXTS, "They're 12345 DON'T x12 naïveté I'LL HTTPServer's  indented\n\n  text", "the buns on the kettle"] * 3


def original(expression: str | None, *, composes: bool = False, digits: bool = False) -> Tokenizer:
    """A byte-level tokenizer as published: a word is split by `expression`, or as GPT-2 does it."""
    backend = Tokenizer(models.BPE())
    if composes:
        backend.normalizer = normalizers.NFC()
    cuts: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if expression is not None:
        cuts.append(pre_tokenizers.Split(Regex(expression), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def metadata_of(backend: Tokenizer, split: str, **extra: object) -> dict[str, Any]:
    model = json.loads(backend.to_str())["model"]
    tokens = [backend.id_to_token(id) for id in range(backend.get_vocab_size())]
    kinds = [3 if token in SPECIALS else 4 if token == "<think>" else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tuple(tokens),
        "tokenizer.ggml.token_type": tuple(kinds),
        "tokenizer.ggml.merges": tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"]),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 3,
        **{f"tokenizer.{key}": value for key, value in extra.items()},
    }


def loaded(values: Mapping[str, Any], folder: Path) -> TextModel:
    for name, data in tokenizer_files(Metadata(values, "x.gguf")).items():
        (folder / name).write_bytes(data)
    return load_text_model(folder)


@pytest.mark.parametrize(
    ("split", "settings"),
    [
        ("gpt-2", {"expression": None}),
        ("llama-bpe", {"expression": LLAMA3}),
        ("qwen2", {"expression": QWEN2, "composes": True}),
        ("tekken", {"expression": TEKKEN}),
        ("gpt-4o", {"expression": GPT4O}),
        ("smollm", {"expression": None, "digits": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_byte_level_ids_are_the_originals(split: str, settings: dict[str, Any], tmp_path: Path) -> None:
    backend = original(**settings)
    found = loaded(metadata_of(backend, split), tmp_path).tokenizer
    for text in TEXTS:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert list(found.encode(text, add_special_tokens=False)) == ids, text
        assert found.decode(ids) == backend.decode(ids, skip_special_tokens=True)


def test_the_splits_differ_on_these_texts() -> None:
    """Else the test above could not tell one from another."""
    found = set()
    for expression, digits in (
        (None, False),
        (LLAMA3, False),
        (QWEN2, False),
        (TEKKEN, False),
        (GPT4O, False),
        (None, True),
    ):
        cut = original(expression, digits=digits).pre_tokenizer
        assert cut is not None
        found.add(tuple(piece for text in TEXTS for piece, _ in cut.pre_tokenize_str(text)))
    assert len(found) == 6


def test_a_word_that_is_a_token_is_taken_whole_where_the_original_does(tmp_path: Path) -> None:
    values = metadata_of(original(LLAMA3), "llama-bpe")
    values["tokenizer.ggml.tokens"] += ("Ġzqx",)
    values["tokenizer.ggml.token_type"] += (1,)
    whole = len(values["tokenizer.ggml.tokens"]) - 1
    assert loaded(values, tmp_path).tokenizer.encode("a zqx", add_special_tokens=False)[-1] == whole
    values["tokenizer.ggml.pre"] = "smaug-bpe"
    assert whole not in loaded(values, tmp_path).tokenizer.encode("a zqx", add_special_tokens=False)


def test_the_beginning_is_added_as_the_file_or_else_the_kind_says(tmp_path: Path) -> None:
    backend = original(LLAMA3)

    def around(split: str, **extra: object) -> tuple[int, ...]:
        model = loaded(metadata_of(backend, split, **extra), tmp_path)
        return model.tokenizer.encode("", add_special_tokens=True)

    assert around("llama-bpe") == (0,)
    assert around("gpt-2") == ()
    assert around("gpt-2", **{"ggml.add_bos_token": True, "ggml.add_eos_token": True}) == (0, 3)
    assert around("llama-bpe", **{"ggml.add_bos_token": False}) == ()


def test_template_and_end_tokens_come_along(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ bos_token + m['content'] + '<|end|>' }}{% endfor %}"
    values = metadata_of(original(LLAMA3), "llama-bpe", chat_template=template, **{"ggml.eot_token_id": 2})
    model = loaded(values, tmp_path)
    assert model.template is not None
    assert model.template.render([{"role": "user", "content": "hi"}]) == "<|begin|>hi<|end|>"
    assert model.eos_ids == {2, 3}
    assert special_ids(Metadata(values, "x.gguf")) == {"bos_token_id": 0, "eos_token_id": [2, 3], "pad_token_id": None}


def test_recommended_sampling_comes_along(tmp_path: Path) -> None:
    values = metadata_of(original(None), "gpt-2")
    stated = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1}
    found = loaded(values | {f"general.sampling.{name}": value for name, value in stated.items()}, tmp_path)
    assert found.defaults == SamplingDefaults(0.6, 20, 0.95, 0.05, 1.1)
    assert loaded(values, tmp_path).defaults == SamplingDefaults()


def test_known_end_tokens_count_though_the_file_names_another(tmp_path: Path) -> None:
    values = metadata_of(original(LLAMA3), "llama-bpe")
    values["tokenizer.ggml.tokens"] += ("<|eot_id|>", "<|im_end|>")
    values["tokenizer.ggml.token_type"] += (3, 1)  # the second one is ordinary text here
    assert loaded(values, tmp_path).eos_ids == {3, len(values["tokenizer.ggml.tokens"]) - 2}


def test_what_ends_a_thought_of_gpt_oss_does_not_end_its_answer(tmp_path: Path) -> None:
    values = metadata_of(original(None), "gpt-2", **{"ggml.eos_token_id": 1})
    values["tokenizer.ggml.tokens"] += ("<|return|>", "<|call|>")
    values["tokenizer.ggml.token_type"] += (3, 3)
    count = len(values["tokenizer.ggml.tokens"])
    assert SPECIALS[3] == "<|end|>"
    assert loaded(values, tmp_path).eos_ids == {1, count - 2, count - 1}


# -- SentencePiece ---------------------------------------------------------------------------------------


def trained(**settings: object) -> Any:
    """A SentencePiece model as Llama 2 (and, without a prefix, Gemma) has it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="comes with mlx-lm")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def pieces_of(model: Any, **extra: object) -> dict[str, Any]:
    ids = range(model.get_piece_size())

    def kind(id: int) -> int:
        flags = {2: model.is_unknown(id), 3: model.is_control(id), 6: model.is_byte(id)}
        user = model.id_to_piece(id) in ("<think>", "▁▁", "▁▁▁▁")
        return next((number for number, is_so in flags.items() if is_so), 4 if user else 1)

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tuple(model.id_to_piece(id) for id in ids),
        "tokenizer.ggml.scores": tuple(model.get_score(id) for id in ids),
        "tokenizer.ggml.token_type": tuple(kind(id) for id in ids),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


PLAIN = [text for text in TEXTS if "<" not in text and text]


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentencepiece_ids_are_the_originals(prefixed: bool, tmp_path: Path) -> None:
    model = trained(add_dummy_prefix=prefixed)
    found = loaded(pieces_of(model, add_space_prefix=prefixed), tmp_path).tokenizer
    for text in PLAIN:
        assert list(found.encode(text, add_special_tokens=False)) == model.encode(text), text
        assert found.decode(model.encode(text)) == text
    assert found.encode("on", add_special_tokens=True)[0] == model.bos_id()


@pytest.mark.parametrize("as_spaces", [True, False], ids=["spaces", "signs"])
def test_pieces_that_a_person_defined_are_never_merged(as_spaces: bool, tmp_path: Path) -> None:
    """Runs of spaces as Gemma has them; converters write them as spaces, and used to write them as signs."""
    model = trained(add_dummy_prefix=False, user_defined_symbols=["<think>", "▁▁", "▁▁▁▁"])
    values = pieces_of(model, add_space_prefix=False)
    if as_spaces:
        spaced = [
            t.replace("▁", " ") if k == 4 else t
            for t, k in zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True)
        ]
        values["tokenizer.ggml.tokens"] = tuple(spaced)
    found = loaded(values, tmp_path).tokenizer
    for text in (*PLAIN, "a<think>b", "x     y", "x  y    z"):
        assert list(found.encode(text, add_special_tokens=False)) == model.encode(text), text


def test_phi_3_swallows_spaces_behind_its_own_tokens(tmp_path: Path) -> None:
    model = trained(add_dummy_prefix=True, control_symbols=["<|end|>"])
    values = pieces_of(model) | {"general.architecture": "phi3"}
    spaced = loaded(values, tmp_path).tokenizer.encode("on<|end|>\n on", add_special_tokens=False)
    assert spaced == loaded(values, tmp_path).tokenizer.encode("on<|end|>on", add_special_tokens=False)
    other = loaded(values | {"general.architecture": "llama"}, tmp_path).tokenizer
    assert other.encode("on<|end|>\n on", add_special_tokens=False) != spaced


# -- What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokenizer.ggml.pre": "starling-9"}, "splits words as 'starling-9'"),
        ({"tokenizer.ggml.model": "rwkv"}, "of kind 'rwkv'"),
        ({"tokenizer.ggml.tokens": ("a", "a")}, "some twice"),
        ({"tokenizer.ggml.token_type": (1,)}, "1 kinds"),
        ({"tokenizer.ggml.eos_token_id": 5000}, "eos_token_id is 5000"),
        ({"tokenizer.ggml.merges": ("ab",)}, "no two parts"),
        ({"tokenizer.ggml.merges": ("zz zz",)}, "does not hold together"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.remove_extra_whitespaces": True}, "is set"),
    ],
)
def test_what_cannot_be_converted_is_named(changed: dict[str, object], said: str) -> None:
    values = metadata_of(original(None), "gpt-2") | changed
    with pytest.raises(ModelError, match=said):
        tokenizer_files(Metadata(values, "x.gguf"))


def test_endless_tokens_are_refused() -> None:
    values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ("a" * 100_000,)}
    with pytest.raises(ModelError, match="characters"):
        tokenizer_files(Metadata(values, "x.gguf"))


def test_a_file_without_a_tokenizer_says_so() -> None:
    with pytest.raises(ModelError, match=r"expected tokenizer\.ggml\.tokens in its metadata"):
        tokenizer_files(Metadata({}, "x.gguf"))
