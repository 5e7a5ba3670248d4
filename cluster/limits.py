"""Every limit of the system, with its unit, who legitimately needs how much, and whom it stops.

Relations between limits are asserted at the bottom, so that changing one cannot silently break another.
"""

from __future__ import annotations

from typing import Final

from cluster.quantities import KIB, MIB

# -- Wire ------------------------------------------------------------------------------------------------

PROTOCOL_VERSION: Final = 4
"""Raised whenever a frame or control message changes meaning; both sides must agree exactly."""

FRAME_PAYLOAD_BYTES_MAX: Final = 1 * MIB
"""Tensor bytes in one message. A decode row needs 4 to 16 KiB; larger messages stall the event loop for
milliseconds (4 MiB: 5 to 10 ms measured), so a long prefill travels as several."""

FRAME_HEADER_BYTES_MAX: Final = 256 * KIB
"""The msgpack header: rows and their token ids. 2,048 tokens and 256 rows take about 40 KiB."""

GRPC_MESSAGE_BYTES_MAX: Final = FRAME_PAYLOAD_BYTES_MAX + FRAME_HEADER_BYTES_MAX + 4 * KIB
"""gRPC refuses anything longer before it is parsed, on both sides."""

STEP_TOKENS_MAX: Final = 2048
"""Tokens in one step over all rows. Bounds workspace memory, and with it what a frame may claim to hold."""

UNPACKED_BYTES_MAX: Final = 32 * MIB
"""Of a packed matrix at a time, with what it takes to unpack it, where an engine has no product for it: enough to keep
a GPU busy. A stage's workspace counts it."""

UNPACKED_ON_CPU_BYTES_MAX: Final = 6 * MIB
"""The same on a processor: 4 MiB where rows are unpacked; up to 6 where codes are put in the order of a kernel, or
unpacked from it, which takes whole blocks of rows, some columns at a time."""

RECORDED_BYTES_MAX: Final = 256 * MIB
"""What recorded decode steps may take on a GPU, all numbers of rows together: logits of 64 rows of 152,064 tokens are
37 MiB in float32 and as much again on the way there, a library's workspace 32 MiB, rounding 24 MiB. A stage's workspace
counts it; a step for which it is not enough is computed unrecorded."""

STEP_ROWS_MAX: Final = 256
"""Rows in one step: more concurrent decoding sequences than LAN machines can serve."""

STEP_VERBS_MAX: Final = 1024
"""Cache verbs in one step: a burst of cancels drops every sequence at once."""

SEQUENCES_PER_USER: Final = 2
"""Live sequences for each promised context, where every sequence has a cost of its own however short it is (a window,
a state): a chat and something small beside it. More of them would be promised memory that long ones then lack."""

SEQUENCES_MAX: Final = 256
"""Live sequences in a deployment, bounding the nodes' bookkeeping."""

MLX_FREED_BYTES_MAX: Final = 256 * MIB
"""What MLX may keep of freed buffers on an Apple GPU, where allocating is slow. A step's activations fit; its default,
all memory that there is, would break the promise of a memory budget. Nodes keep as much back."""

# -- Weights ---------------------------------------------------------------------------------------------

WEIGHT_CHUNK_BYTES: Final = 1 * MIB
"""One message of a weight transfer: large enough to fill a 10 Gbit/s link, small enough to cancel quickly."""

SAFETENSORS_HEADER_BYTES_MAX: Final = 100 * MIB
"""The format's own limit on its JSON header; a lying length above it is refused before any allocation."""

CONFIG_BYTES_MAX: Final = 4 * MIB
"""A model's config.json. Most take a few KiB; per-layer quantisation tables reach some hundred."""

INDEX_BYTES_MAX: Final = 64 * MIB
"""A model.safetensors.index.json names every tensor once: 100,000 tensors take about 10 MiB."""

GGUF_HEADER_BYTES_MAX: Final = 128 * MIB
"""A GGUF file's metadata and tensor list. A vocabulary of 262,144 tokens with its merges takes about 12 MiB."""

GGUF_ENTRIES_MAX: Final = 1 << 17
"""Metadata entries or tensors of one GGUF file: files have some 50 and some 2,000."""

GGUF_ITEMS_MAX: Final = 1 << 22
"""Items of all lists in a GGUF file's metadata: 262,144 tokens, their scores and kinds, and some 500,000 merges."""

GGUF_KEY_BYTES_MAX: Final = 65_535
"""One metadata key or tensor name, by the format; real ones have fewer than 64."""

MANIFEST_BYTES_MAX: Final = 64 * MIB
"""A manifest lists every tensor: a model of 100,000 tensors takes about 20 MiB."""

# -- Requests --------------------------------------------------------------------------------------------

HTTP_BODY_BYTES_MAX: Final = 16 * MIB
"""A request's body, refused while it arrives. A million-token prompt is about 5 MiB of text."""

HTTP_BODY_TIMEOUT_S: Final = 60.0
"""A request's body, from its headers to its last byte: the largest one at 2.5 Mbit/s. Stops clients that drip."""

CHOICES_MAX: Final = 16
"""`n` times the number of prompts of one request; each choice is a sequence of its own."""

STOPS_MAX: Final = 16
"""Stop strings of one request (OpenAI allows 4; local clients use more)."""

STOP_CHARS_MAX: Final = 512
"""Characters of one stop string; this much text may be held back before it is streamed."""

QUEUED_REQUESTS_MAX: Final = 128
"""Choices waiting for KV room in a lane; the next one gets 429. At 10 s an answer nobody waits for the 129th."""

QUEUED_PROMPT_TOKENS_MAX: Final = 1 << 19
"""Prompt tokens waiting in a lane: 64 chats of 8,192 tokens. At 1,000 tokens a second they are nine minutes of prefill;
a queue of long documents is full before it has 128 of them."""

HISTORY_TURNS_MAX: Final = 2048
"""Turns whose drawn tokens the coordinator remembers for what follows: 100 chats of 20 turns."""

HISTORY_BYTES_MAX: Final = 64 * MIB
"""Of all their texts and tokens, each as what it adds to the turn before. English takes some 2 bytes a character, so
2,048 turns of 2,000 tokens fit four times; emoji, drawn byte by byte, take up to 20."""

HISTORY_SHARE: Final = 0.25
"""Of both, what one address may take. Its turns, which each new chat of its own is compared with, are at most 512."""

UNREAD_TOKENS_MAX: Final = 16_384
"""Tokens of an answer that wait for a client to read on, in 2 MiB. The sockets' buffers hold as many again, so a paused
terminal loses nothing; a client that never reads cannot fill memory with a long answer, nor keep its cache."""

RETRY_AFTER_MAX_S: Final = 120.0
"""The longest that a client is told to stay away; the queue's pace says little about later."""

BATCH_PATIENCE_S: Final = 300.0
"""A batch request that has waited this long no longer stands back for interactive ones: the lanes share equally, and
what does not fit in front of it has to wait as well."""

# -- Discovery -------------------------------------------------------------------------------------------

NAME_BYTES_MAX: Final = 63
"""A node's or cluster's name in UTF-8: what one DNS label holds. Hostnames obey the same limit."""

SIGHTINGS_MAX: Final = 256
"""Advertisements followed at once. A LAN has tens of nodes; anyone on it can forge thousands."""

SIGHTING_ADDRESSES_MAX: Final = 16
"""Addresses kept of one advertisement: a machine with four cards has about twelve."""

# -- Time ------------------------------------------------------------------------------------------------

UNREAD_TIMEOUT_S: Final = 300.0
"""A stream of which a client reads nothing for so long is closed; somebody may look at what a paused terminal shows."""

SILENCE_MAX_S: Final = 10.0
"""A stream in which nothing happens carries a comment after so long, for clients and proxies that would give it up."""

GRACE_S: Final = 60.0
"""Answers wait so long for a plan when the one that served them broke: a machine that slept is back sooner."""

QUEUE_TIMEOUT_S: Final = 300.0
"""An interactive request's wait for room. Official clients give up after 600 s: half of it is left for the answer."""

BATCH_TIMEOUT_S: Final = 24 * 3600.0
"""A batch request's wait for room, and its whole life: what is queued in the evening may run through the night."""

FIRST_TOKEN_TIMEOUT_S: Final = 1800.0
"""From room in the caches to the first token: 100,000 prompt tokens at 60 a second. Beyond it nobody waits."""

BETWEEN_TOKENS_TIMEOUT_S: Final = 300.0
"""Between two tokens of an answer: a sequence that had to give its room back waits this long for it."""

REQUEST_TIMEOUT_S: Final = 2 * 3600.0
"""An interactive request from its arrival to its last token: 36,000 tokens at five a second."""

CONTROL_TIMEOUT_S: Final = 5.0
"""A unary control call on a LAN takes milliseconds; a machine that needs longer is suspect."""

STEP_TIMEOUT_S: Final = 60.0
"""A step of 2,048 tokens through a large model on a slow machine takes tens of seconds; beyond this it is stuck."""

FIRST_STEP_TIMEOUT_S: Final = 180.0
"""The first step after a load compiles kernels and touches every page of the weights."""

LOAD_STALL_TIMEOUT_S: Final = 60.0
"""Loading must report progress this often: a disk or link that moves nothing for a minute is broken."""

HEARTBEAT_INTERVAL_S: Final = 0.5
HEARTBEAT_LOST_S: Final = 3.0
"""Six missed beats make a loss; a 1.2 s freeze must not evict a healthy laptop."""

LEASE_TTL_S: Final = 10.0
"""A node serves nobody else until this long after its coordinator was last heard."""

KEEPALIVE_TIME_S: Final = 2.0
KEEPALIVE_TIMEOUT_S: Final = 2.0
"""gRPC pings; with grpc.http2.ping_timeout_ms set as well they notice a frozen peer (1.7 s measured at 1 s)."""

assert FRAME_PAYLOAD_BYTES_MAX + FRAME_HEADER_BYTES_MAX < GRPC_MESSAGE_BYTES_MAX
assert WEIGHT_CHUNK_BYTES <= FRAME_PAYLOAD_BYTES_MAX
assert HEARTBEAT_INTERVAL_S * 3 < HEARTBEAT_LOST_S < LEASE_TTL_S
assert STEP_ROWS_MAX <= STEP_TOKENS_MAX and SEQUENCES_MAX <= STEP_VERBS_MAX
assert STEP_TIMEOUT_S < FIRST_STEP_TIMEOUT_S
assert STEP_TIMEOUT_S < BETWEEN_TOKENS_TIMEOUT_S <= FIRST_TOKEN_TIMEOUT_S <= REQUEST_TIMEOUT_S <= BATCH_TIMEOUT_S
assert BATCH_PATIENCE_S <= QUEUE_TIMEOUT_S <= REQUEST_TIMEOUT_S
