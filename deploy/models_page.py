"""Writes docs/models.md from docs/models.json, or (without --write) fails when the page is not what follows from it.

The second file is what tests/oracle showed when it last ran (`make docs`); the page says nothing that is not in it,
except which engines refuse a family, which is in the table of families.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cluster.models.families import known_families
from cluster.models.family import Family
from cluster.types import Backend

ROOT = Path(__file__).resolve().parent.parent
SHOWN, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
FULL_PRECISION = "full precision"
FULL_WIDTH = "float32"

Shown = Mapping[str, object]
"""One line of the file: family, format, dtype, engines (of the stages, in order), judge and tolerance."""

HEAD = """# Models that run, as the tests showed it

Made by `make docs` from what the tests in `tests/oracle` showed; nothing below this text was written by hand, and
nothing is there that no passing test showed. Each entry is a pipeline of one to three stages, from a tiny random
checkpoint of the family: as `save_pretrained` or `mlx_lm.convert` writes it, or, in formats whose own tools Potluck
does without (AWQ, GPTQ, compressed-tensors, FP8, GGUF, gpt-oss as published), written by the format's definition. Its
greedy text of 32 tokens and more was the text of the whole model in one process, and no logit (they are about ten wide)
differed by more than the tolerance. The library after the tolerance is the one that ran the whole model; of a packed
checkpoint, with the same packed weights or with what they unpack to. Where `mlx-lm` did, which is the stricter one, the
numbers were its own.

Activations, and what scales GGUF's codes, were float32 unless the row says otherwise. In 16 bits rounding moves logits
by a thirtieth of their width, and by more where experts are chosen, so text and logits tell little there. Instead every
layer was given what `transformers` has there in 16 bits; it may be so many times as far from what float32 makes of the
same input as `transformers` itself is (the median token, of a prompt and of an answer; one norm a tenth too large, or
one position too many, is 15 times as far). Logits of the whole pipeline may be as far without experts, and 0.6 of their
width with experts; in full precision without experts, the text was the same wherever one token is clearly ahead. MLX on
a CPU, where all this ran, has no unpacked experts in 16 bits, so there the table shows none.

*with vision*: a vision-language checkpoint, of which the text model runs. Refused by name at load: longrope beyond the
context that the model was first made for, and MLX's mxfp8 and nvfp4 on torch.

A dash: no test shows it. *refused*: the engine does not load such a model, and says why.

| Family | Format | torch | MLX | torch and MLX mixed |
|---|---|---|---|---|
"""


def render(shown: Sequence[Shown], families: Sequence[Family]) -> str:
    """The page."""
    by_row: dict[tuple[object, str], list[Shown]] = defaultdict(list)
    for entry in shown:
        name = f"{entry['format']}" + ("" if entry["dtype"] == FULL_WIDTH else f", in {entry['dtype']}")
        by_row[entry["family"], name].append(entry)
    lines = []
    for family in families:
        formats = sorted((name for of, name in by_row if of == family.model_type), key=_full_precision_first)
        for place, name in enumerate(formats or [FULL_PRECISION]):
            title = f"{family.title} (`{family.model_type}`)" if place == 0 else ""
            cells = [_cell(kind, by_row[family.model_type, name], family) for kind in ("torch", "mlx", "mixed")]
            lines.append(f"| {title} | {name} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n"


def _full_precision_first(name: str) -> tuple[bool, str]:
    return not name.startswith(FULL_PRECISION), name


def _cell(kind: str, row: Iterable[Shown], family: Family) -> str:
    needed = {Backend(kind)} if kind != "mixed" else set(Backend)
    if not needed <= family.engines:
        return "*refused*"
    entries = [entry for entry in row if _kind(entry) == kind]
    if not entries:
        return "–"
    counts = sorted({len(_engines(entry)) for entry in entries})
    stages = "1 stage" if counts == [1] else f"{_runs(counts)} stages"
    judges = sorted({(float(str(entry["tolerance"])), str(entry["judge"]), _unit(entry)) for entry in entries})
    return f"{stages}; {', '.join(f'{tolerance:g}{unit} {judge}' for tolerance, judge, unit in judges)}"


def _unit(entry: Shown) -> str:
    """In 16 bits the tolerance is a multiple of the judge's own rounding."""
    return "" if entry["dtype"] == FULL_WIDTH else " ×"


def _runs(counts: Sequence[int]) -> str:
    """`2`, `1 or 3`, `1–3`."""
    in_a_row = len(counts) > 1 and list(counts) == list(range(counts[0], counts[-1] + 1))
    return f"{counts[0]}–{counts[-1]}" if in_a_row else " or ".join(map(str, counts))


def _engines(entry: Shown) -> Sequence[str]:
    engines = entry["engines"]
    assert isinstance(engines, list)
    return engines


def _kind(entry: Shown) -> str:
    engines = set(_engines(entry))
    return engines.pop() if len(engines) == 1 else "mixed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page instead of comparing it")
    arguments = parser.parse_args()
    page = render(json.loads(SHOWN.read_text()), known_families())
    if arguments.write:
        PAGE.write_text(page)
    elif PAGE.read_text() != page:
        print(f"{PAGE.relative_to(ROOT)} does not follow from {SHOWN.name}; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
