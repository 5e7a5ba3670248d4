"""Triton's compiler accepts the kernels for the cards of the last years, with no card here.

Collected only where Triton is and its interpreter is off: `make kernels` puts it beside the environment.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from node.engines.torch.ragged import _GROUP_MIN, _STAGES, _power_of_two, block_of
from tests.oracle.ragged_cases import Case
from tests.oracle.test_ragged import CASES

HERE = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_BYTES_MAX = 64 * 1024
"""What a program may have beside its registers on every one of these cards."""

WIDE = {name: CASES[name] for name in ("lengths", "size 128", "size 256", "all at once", "bfloat16", "float16")}
"""Those that differ in what the compiler has to do."""


def _compiled(kernel: str, signature: dict[str, str], fixed: dict[str, Any], target: tuple[Any, ...]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from node.engines.torch import ragged_kernels

    function = getattr(ragged_kernels, kernel)
    types = {name: signature.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(fn=function, signature=types, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget(*target), options={"num_stages": _STAGES})


def _sizes(case: Case) -> dict[str, int]:
    keys, values = _power_of_two(case.key_size), _power_of_two(case.value_size)
    return {"key_size": case.key_size, "key_pad": keys, "value_size": case.value_size, "value_pad": values}


def _element(case: Case) -> str:
    return {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[str(case.dtype).removeprefix("torch.")]


def write(case: Case, target: tuple[Any, ...]) -> Any:
    signature = {"new_keys": _element(case), "new_values": _element(case), "places": "*i64", "positions": "*i64"}
    strides = ("key_head_stride", "key_row_stride", "value_head_stride", "value_row_stride", "places_stride")
    return _compiled("write", signature | dict.fromkeys(strides, "i32"), _sizes(case), target)


def attend_share(case: Case, target: tuple[Any, ...]) -> Any:
    signature = {"query": _element(case), "places": "*i64", "positions": "*i64", "sums": "*fp32", "totals": "*fp32"}
    signature |= {"scaling": "fp32", "softcap": "fp32"}
    signature |= dict.fromkeys(("query_head_stride", "query_row_stride", "places_stride"), "i32")
    group = case.heads // case.kv_heads
    fixed = {
        "group": group,
        "group_pad": max(_GROUP_MIN, _power_of_two(group)),
        "window": case.window or 0,
        "capped": case.softcap is not None,
        "shares": 8,
        "block": block_of(max(_power_of_two(case.key_size), _power_of_two(case.value_size)), case.dtype),
    }
    return _compiled("attend_share", signature, fixed | _sizes(case), target)


def merge_shares(case: Case, target: tuple[Any, ...]) -> Any:
    signature = {"sums": "*fp32", "totals": "*fp32", "output": _element(case)}
    fixed: dict[str, Any] = {"value_size": case.value_size, "value_pad": _power_of_two(case.value_size), "shares": 8}
    if case.has_sinks:
        signature["sinks"] = _element(case)
    else:
        fixed["sinks"] = None
    return _compiled("merge_shares", signature, fixed, target)


if HERE:

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("name", WIDE)
    def test_kernels_compile_for_every_card(name: str, target: str) -> None:
        for compile_kernel in (write, attend_share, merge_shares):
            compiled = compile_kernel(WIDE[name], TARGETS[target])
            assert compiled.metadata.shared <= SHARED_BYTES_MAX

    @pytest.mark.parametrize("name", ["bfloat16", "size 80"])
    def test_keys_and_values_are_read_sixteen_bytes_at_a_time(name: str) -> None:
        """What is promised of addresses reaches the instructions: else each thread would read an element at a time,
        and none before it is needed."""
        text = attend_share(CASES[name], TARGETS["sm_90"]).asm["ptx"]
        copies = [line for line in text.splitlines() if "cp.async" in line and "global" in line]
        assert copies
        assert all("cp.async.cg" in line for line in copies), "the copies of 16 bytes"
        assert "ld.global.b16" not in text
