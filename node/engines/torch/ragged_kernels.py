"""Triton's kernels for one new token of each of several sequences, whose keys and values stay where they lie.

A kernel is told addresses, so nothing is copied together for a step. `places` says of each row, in int64: where its
keys begin, where its values begin, how many positions there is room for, and which position comes first; keys at 0 are
a row for nobody. `positions` are those of the new tokens. Sizes ending in `_pad` are the next powers of two: Triton has
no others. Knows nothing of models; imported only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write(
    new_keys: tl.tensor,
    new_values: tl.tensor,
    places: tl.tensor,
    positions: tl.tensor,
    key_head_stride: tl.tensor,
    key_row_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_row_stride: tl.tensor,
    places_stride: tl.tensor,
    key_size: tl.constexpr,
    key_pad: tl.constexpr,
    value_size: tl.constexpr,
    value_pad: tl.constexpr,
) -> None:
    """Put each row's new key and value, of one of its kv heads, behind the others. Grid: rows, kv heads."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    place = places + row * places_stride
    key_address = tl.load(place)
    value_address = tl.load(place + 1)
    at = head * tl.load(place + 2) + tl.load(positions + row) - tl.load(place + 3)
    if key_address != 0:
        dims = tl.arange(0, key_pad)
        keys = tl.multiple_of(tl.cast(key_address, tl.pointer_type(new_keys.dtype.element_ty)), 16) + at * key_size
        new = tl.load(new_keys + head * key_head_stride + row * key_row_stride + dims, mask=dims < key_size)
        tl.store(keys + dims, new, mask=dims < key_size)
        dims = tl.arange(0, value_pad)
        values = (
            tl.multiple_of(tl.cast(value_address, tl.pointer_type(new_values.dtype.element_ty)), 16) + at * value_size
        )
        new = tl.load(new_values + head * value_head_stride + row * value_row_stride + dims, mask=dims < value_size)
        tl.store(values + dims, new, mask=dims < value_size)


@triton.jit
def attend_share(
    query: tl.tensor,
    places: tl.tensor,
    positions: tl.tensor,
    sums: tl.tensor,
    totals: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    query_head_stride: tl.tensor,
    query_row_stride: tl.tensor,
    places_stride: tl.tensor,
    group: tl.constexpr,
    group_pad: tl.constexpr,
    key_size: tl.constexpr,
    key_pad: tl.constexpr,
    value_size: tl.constexpr,
    value_pad: tl.constexpr,
    window: tl.constexpr,
    capped: tl.constexpr,
    shares: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """What the heads that share keys find in one share of a row's past: weighed values and their weights, not yet
    divided, and what the scores were lessened by. Grid: rows, kv heads, shares of the past."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    share = tl.program_id(2)
    place = places + row * places_stride
    key_address = tl.load(place)
    value_address = tl.load(place + 1)
    capacity = tl.load(place + 2)
    length = tl.where(key_address != 0, tl.load(positions + row) - tl.load(place + 3) + 1, 0)
    oldest = tl.maximum(length - window, 0) if window > 0 else 0
    step = tl.cdiv(tl.cdiv(length - oldest, shares), block) * block
    begin = oldest + share * step
    end = tl.minimum(begin + step, length)

    heads = tl.arange(0, group_pad)
    key_dims = tl.arange(0, key_pad)
    value_dims = tl.arange(0, value_pad)
    is_head = heads < group
    is_key = key_dims < key_size
    is_value = value_dims < value_size
    queries = tl.load(
        query + row * query_row_stride + (kv_head * group + heads)[:, None] * query_head_stride + key_dims[None, :],
        mask=is_head[:, None] & is_key[None, :],
        other=0.0,
    )
    # The promise has to be the pointer's: one about the address is lost, and two bytes are read at a time.
    keys = tl.multiple_of(tl.cast(key_address, tl.pointer_type(query.dtype.element_ty)), 16)
    values = tl.multiple_of(tl.cast(value_address, tl.pointer_type(query.dtype.element_ty)), 16)
    keys += kv_head * capacity * key_size
    values += kv_head * capacity * value_size
    largest = tl.full([group_pad], float("-inf"), tl.float32)
    total = tl.zeros([group_pad], tl.float32)
    found = tl.zeros([group_pad, value_pad], tl.float32)
    for first in range(begin, end, block):
        seen = first + tl.arange(0, block)
        is_seen = seen < end
        key = tl.load(
            keys + seen[:, None] * key_size + key_dims[None, :], mask=is_seen[:, None] & is_key[None, :], other=0.0
        )
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scaling
        if capped:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # the hyperbolic tangent
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - larger[:, None])
        lessened = tl.exp(largest - larger)
        value = tl.load(
            values + seen[:, None] * value_size + value_dims[None, :],
            mask=is_seen[:, None] & is_value[None, :],
            other=0.0,
        )
        found = found * lessened[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * lessened + tl.sum(weights, axis=1)
        largest = larger

    at = ((row * tl.num_programs(1) + kv_head) * group + heads) * shares + share
    tl.store(totals + at * 2, largest, mask=is_head)
    tl.store(totals + at * 2 + 1, total, mask=is_head)
    tl.store(sums + at[:, None] * value_size + value_dims[None, :], found, mask=is_head[:, None] & is_value[None, :])


@triton.jit
def merge_shares(
    sums: tl.tensor,
    totals: tl.tensor,
    sinks: tl.tensor,
    output: tl.tensor,
    value_size: tl.constexpr,
    value_pad: tl.constexpr,
    shares: tl.constexpr,
) -> None:
    """What a head found in all shares of its row's past. Grid: rows, heads."""
    head = tl.program_id(1)
    place = tl.program_id(0) * tl.num_programs(1) + head
    dims = tl.arange(0, value_pad)
    at = place * shares + tl.arange(0, shares)
    largest = tl.load(totals + at * 2)
    top = tl.maximum(tl.max(largest, axis=0), -1e30)  # a row for nobody has seen nothing
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    lessened = tl.exp(largest - top)
    total = tl.sum(tl.load(totals + at * 2 + 1) * lessened, axis=0)
    if sinks is not None:
        total += tl.exp(sink - top)
    found = tl.load(sums + at[:, None] * value_size + dims[None, :], mask=(dims < value_size)[None, :], other=0.0)
    found = tl.sum(found * lessened[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(output + place * value_size + dims, found.to(output.dtype.element_ty), mask=dims < value_size)
