"""What the oracle tests show, noted while they run: this family, in this format, on these engines, equals its judge.

Nothing has to be written for it: `load_pipeline` says what a pipeline is, `run_step` which one ran, and `assert_same`
in `reference` what was equal. Only a whole pipeline counts, only when its last comparison covered a decisive
continuation, and (see `recording`) only when its test passed. Knows nothing of pages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

from cluster.models.families import family_of
from cluster.types import DType
from node.engine import Engine, StageSpec


@dataclass(frozen=True, slots=True, order=True)
class Shown:
    """One thing that a test showed."""

    family: str  # the model_type of the text model
    format: str  # of the checkpoint, as people call it
    dtype: str  # what is computed in
    engines: tuple[str, ...]  # of the stages, in order
    judge: str  # the library that computed the whole model in one process
    tolerance: float  # the largest difference of two logits; in 16 bits in terms of the judge's own rounding


_specs: WeakKeyDictionary[Engine, StageSpec] = WeakKeyDictionary()
_names: dict[Path, str] = {}
_ran: tuple[tuple[str, StageSpec | None], ...] = ()  # no engines: a test may want to see that one is freed
_shown: set[Shown] = set()


def name_format(folder: Path, name: str) -> None:
    """Call the format of the checkpoint in `folder` so, where it was made of something else, such as `GGUF Q4_0`."""
    _names[folder] = name


def loaded(engine: Engine, spec: StageSpec) -> None:
    _specs[engine] = spec


def ran(engines: Sequence[Engine]) -> None:
    global _ran
    _ran = tuple((engine.backend.value, _specs.get(engine)) for engine in engines)


def equalled(judge: str, tolerance: float) -> None:
    """The pipeline that ran last gave what `judge` says."""
    specs = [spec for _, spec in _ran]
    whole = [spec for spec in specs if spec is not None]
    covered = [layer for spec in whole for layer in spec.layers]
    if len(whole) == len(specs) > 0 and covered == list(range(whole[0].layer_count)):
        folder, dtype = whole[0].folder, whole[0].boundary[0].dtype
        packed = f"{whole[0].bits}-bit, made at load" if whole[0].bits else _format(folder)
        engines = tuple(backend for backend, _ in _ran)
        _shown.add(Shown(_family(folder), packed, _dtype_name(dtype), engines, judge, tolerance))


def take() -> set[Shown]:
    """What was shown since this was last asked."""
    taken = set(_shown)
    _shown.clear()
    return taken


@cache
def _family(folder: Path) -> str:
    family, _ = family_of(json.loads((folder / "config.json").read_text()), str(folder))
    return family.model_type


def _format(folder: Path) -> str:
    return _names.get(folder) or _stored_format(folder)


@cache
def _stored_format(folder: Path) -> str:
    """Read apart from the product's own reader, so that the page cannot inherit its mistakes."""
    config = json.loads((folder / "config.json").read_text())
    if packed := config.get("quantization"):
        mode = packed.get("mode", "affine")
        return "MLX mxfp4" if mode == "mxfp4" else f"MLX {mode} {packed['bits']}-bit, groups of {packed['group_size']}"
    stated = config.get("quantization_config")
    if not stated:
        return "full precision"
    method = str(stated.get("quant_method"))
    if method == "compressed-tensors":
        return f"compressed-tensors {stated.get('format')}"
    return {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "mxfp4": "mxfp4 as gpt-oss publishes it"}.get(method, method)


def _dtype_name(dtype: DType) -> str:
    return {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}[dtype]
