"""Every bound of the system in one place: unit in the name, reason in the comment."""

from __future__ import annotations

# --- messages ----------------------------------------------------------------------------------------------------
FRAME_BYTES_MAX = 16 * 1024 * 1024
"""One frame. A 128k-token prompt is 0.6 MB as msgpack; nginx allows 1 MB bodies, vLLM's server has no bound."""
HELLO_BYTES_MAX = 4096
"""Before a peer is authenticated it can make us hold this much, no more."""
HELLO_SECONDS_MAX = 5.0
NAME_CHARS_MAX = 128
HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS_MAX = 5.0
"""Five missed heartbeats: suspicion, never proof of death."""
OUTBOX_MESSAGES_MAX = 4096
"""Messages waiting for a slow reader on one channel; beyond it the channel is closed, the sender is not blocked."""
CONNECTIONS_MAX = 1024

# --- store -------------------------------------------------------------------------------------------------------
BLOCKS_PER_CALL_MAX = 8192
"""A 262k-token prompt at 32 tokens a block."""
HEADS_MAX = 1024
RANKS_MAX = 1024
LAYERS_MAX = 4096
STORE_LOOKUP_SECONDS_MAX = 0.005
"""In vLLM's scheduler every engine step waits for this, so a slower store is a miss (DESIGN §5)."""
STORE_ATTACH_SECONDS_MAX = 5.0
BREAKER_FAILURES_MAX = 3
"""After so many time-outs in a row every look-up is an instant miss until a probe succeeds (vLLM #49328)."""
BREAKER_PROBE_SECONDS = 1.0
JOIN_SECONDS_MAX = 30.0
JOINS_PER_NODE_MAX = 4096
EARLY_REPORTS_MAX = 1024
EARLY_REPORT_SECONDS_MAX = 30.0
TOMBSTONES_MAX = 4096
TOMBSTONE_SECONDS_MAX = 120.0
QUARANTINE_SHARE_MAX = 0.25
"""Of the slab: above it new writes are refused, for a frozen writer must not starve the rest."""
WRITE_SESSIONS_PER_ENGINE_MAX = 256

# --- fleet -------------------------------------------------------------------------------------------------------
MEMBERS_MAX = 1024
HOLDS_MAX = 256
COMMAND_SECONDS_DEFAULT = 60.0
ENGINE_START_SECONDS_MAX = 600.0
ENGINE_RESTARTS_PER_MINUTE_MAX = 3
CHILD_GRACE_SECONDS = 5.0
"""What children take to leave when the supervisor is gone."""
REQUESTS_IN_FLIGHT_MAX = 4096
REQUEST_SECONDS_MAX = 3600.0
RETRY_AFTER_SECONDS = 1
STREAM_TOKENS_BUFFER_MAX = 65536

# --- HTTP --------------------------------------------------------------------------------------------------------
HTTP_BODY_BYTES_MAX = 8 * 1024 * 1024
STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 512
CHOICES_MAX = 16
LOGPROBS_MAX = 20
