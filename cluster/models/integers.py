"""What AWQ, GPTQ and compressed-tensors state about matrices of integers.

Owns: the settings that decide what a stored integer means, and the refusal, by name, of those that would mean something
else than `(q - zero) * scale`. Whether the files agree is `cluster.models.integer_shapes`' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import ModelError

GROUP_MAX = 1 << 16  # no format shares a scale among more


@dataclass(frozen=True, slots=True)
class Integers:
    """The settings of all quantised matrices of a checkpoint."""

    bits: int
    group: int  # columns that share a scale; 0: all of a row
    symmetric: bool = False  # every zero is half the range
    zeros_are_one_less: bool = False  # as files of GPTQ's first version hold them
    reordered: bool = False  # the columns of a group lie anywhere


def read_awq(found: Mapping[str, object], where: str) -> Integers:
    """Of AutoAWQ's layouts the one for its GEMM kernels; the others hold words in other orders."""
    for name in ("version", "format", "checkpoint_format"):
        layout = found.get(name, "gemm")
        if not isinstance(layout, str) or layout.lower() != "gemm":
            raise _refused(f"AWQ with {name} {layout!r:.40}", "version gemm", where)
    if found.get("zero_point", True) is not True:
        raise _refused(f"AWQ with zero_point {found['zero_point']!r:.40}", "zero_point true", where)
    return Integers(_bits(found, "bits", (4,), "AWQ", where), _group(found, where))


def read_gptq(found: Mapping[str, object], where: str) -> Integers:
    """With `desc_act` columns went into groups in the order of their activations, and `g_idx` says where each went."""
    if found.get("is_marlin_format"):
        raise _refused("GPTQ in Marlin's layout", "checkpoint_format gptq or gptq_v2", where)
    layout = found.get("checkpoint_format", found.get("format", "gptq"))
    if layout not in ("gptq", "gptq_v2"):
        raise _refused(f"GPTQ with checkpoint_format {layout!r:.40}", "gptq or gptq_v2", where)
    return Integers(
        _bits(found, "bits", (4, 8), "GPTQ", where),
        _group(found, where),
        symmetric=found.get("sym") is True,
        zeros_are_one_less=layout == "gptq",
        reordered=found.get("desc_act") is True,
    )


def refuse_more_than_weights(found: Mapping[str, object], where: str) -> None:
    """Of compressed-tensors' settings those that change more than how weights are stored."""
    for name in ("kv_cache_scheme", "transform_config"):
        if found.get(name):
            raise _refused(f"compressed-tensors with a {name}", "none", where)
    sparsity = found.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise _refused("compressed-tensors with a sparsity_config", "dense weights", where)


def read_pack_quantized(found: Mapping[str, object], where: str) -> Integers:
    """Weights alone are integers; an activation or a cache that is quantised as well would be computed otherwise."""
    refuse_more_than_weights(found, where)
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError(f"{where}: expected config_groups in quantization_config, found {groups!r:.80}")
    settings = {_of_group(group, where) for group in groups.values()}
    if len(settings) > 1:
        raise _refused("compressed-tensors with config_groups that differ", "one setting for all matrices", where)
    return settings.pop()


def _of_group(group: object, where: str) -> Integers:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise ModelError(f"{where}: expected weights in each of config_groups, found {group!r:.80}")
    for name in ("input_activations", "output_activations"):
        if group.get(name):
            raise _refused(f"compressed-tensors with {name}", "weights alone to be quantised", where)
    if (stored := group.get("format") or "pack-quantized") != "pack-quantized":
        raise _refused(f"compressed-tensors with a group's format {stored!r:.40}", "pack-quantized", where)
    if (kind := weights.get("type", "int")) != "int":
        raise _refused(f"pack-quantized weights of type {kind!r:.40}", "int", where)
    if (strategy := weights.get("strategy")) not in ("group", "channel"):
        raise _refused(f"pack-quantized weights with strategy {strategy!r:.40}", "group or channel", where)
    bits = _bits(weights, "num_bits", (4, 8), "pack-quantized weights", where)
    symmetric = weights.get("symmetric", True) is True
    group = _group(weights, where) if strategy == "group" else 0
    return Integers(bits, group, symmetric, reordered=weights.get("actorder") in ("group", "dynamic", True))


def _bits(found: Mapping[str, object], name: str, allowed: tuple[int, ...], what: str, where: str) -> int:
    bits = found.get(name)
    if type(bits) is not int or bits not in allowed:
        raise _refused(f"{what} with {name} {bits!r:.40}", " or ".join(map(str, allowed)), where)
    return bits


def _group(found: Mapping[str, object], where: str) -> int:
    group = found.get("group_size", 128)
    if type(group) is not int or not (group == -1 or 1 <= group <= GROUP_MAX):
        raise ModelError(f"{where}: expected group_size -1 or from 1 to {GROUP_MAX}, found {group!r:.40}")
    return max(group, 0)


def _refused(found: str, expected: str, where: str) -> ModelError:
    return ModelError(
        f"{where}: the weights are quantised as {found}, which Potluck does not compute exactly; it expects "
        f"{expected}. Use another version of this model"
    )
