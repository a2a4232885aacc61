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
OUTBOX_BYTES_MAX = 64 * 1024 * 1024
"""The same bound in bytes: a few large frames weigh more than many small ones."""
INBOX_MESSAGES_MAX = 1024
"""Messages received and not yet taken; beyond it nothing more is read, so the peer's outbox fills instead."""
FDS_PER_MESSAGE_MAX = 16
FDS_WAITING_MAX = 64
"""Descriptors received on one connection and not yet taken: a peer must not use up ours."""
CLOSE_SECONDS_MAX = 1.0
"""What a closing channel waits for its last words to leave."""
PEERS_KNOWN_MAX = 16384
"""Names whose highest incarnation a receiver keeps; the one heard least recently is forgotten first."""
HOST_THREADS_MAX = 8
"""Blocking calls of one process that run at a time off its loop."""
EVENTS_KEPT_MAX = 4096
METRIC_SERIES_MAX = 1024
"""Label combinations of one metric: beyond it a label carries something unbounded, which is a defect."""

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
SLOT_GRAIN_BYTES = 4096
"""A slot's number is its offset in the slab in pages, so blocks of several layouts need no table to be found."""
SLAB_BYTES_MAX = 1 << 44
LAYOUTS_PER_SLAB_MAX = 64
PENDING_REPORTS_MAX = 4096
"""Reports a rank keeps until the node has acknowledged them; the node itself allows fewer sessions than that."""
REPORT_RETRY_SECONDS = 0.2

LOAD_SECONDS_MAX = 10.0
"""From a rank's hearing of a load to its outcome: recomputing is then the quicker way."""
LOADS_QUEUED_MAX = 1024
"""Loads waiting in one rank; a further one is a miss at once."""
IDLE_STEP_SECONDS_MAX = 0.005
"""How long a step that computes nothing waits for a load instead of polling; a new request waits as long at most."""
REQUESTS_TRACKED_MAX = 65536
"""Requests whose keys one engine's connector remembers; above it a new one is simply not shared."""

# --- fleet -------------------------------------------------------------------------------------------------------
MEMBERS_MAX = 1024
FACT_CHARS_MAX = 1024
"""An engine's address or model identity: 1,024 members with such facts still fit into one frame of `Membership`."""
CAPABILITIES_MAX = 32
HOLDS_MAX = 256
COMMAND_SECONDS_DEFAULT = 60.0
ENGINE_START_SECONDS_MAX = 600.0
ENGINE_RESTARTS_PER_MINUTE_MAX = 3
PART_START_SECONDS_MAX = 60.0
"""What coordinator, store and front take to start on a loaded machine; beyond it something is wrong."""
CHILD_GRACE_SECONDS = 5.0
"""What children take to leave when the supervisor is gone."""
REQUESTS_IN_FLIGHT_MAX = 4096
REQUEST_SECONDS_MAX = 3600.0
RETRY_AFTER_SECONDS = 1
REQUEST_SECONDS_DEFAULT = 600.0
"""A request without a deadline of its own: longer than any answer takes, shorter than for ever."""
REQUEST_FAILURES_MAX = 5
"""Engines that may fail at one request without a token of it: it may be what they die of. Waiting beside such a one is
enough to be counted, so it is more than a few."""
NO_MEMBER_SECONDS_MAX = 120.0
"""What a request waits when every engine is gone: a restart takes less, an operator more."""
RECONNECT_SECONDS_MIN = 0.02
RECONNECT_SECONDS_MAX = 1.0
FRONT_GRACE_SECONDS = 10.0
"""How long an engine computes for a front whose connection is gone: a front is restarted and back within a few."""
TOKENS_PER_FRAME_MAX = 8192
"""Tokens that an engine puts into one frame: with 20 logprobs each they still fit into FRAME_BYTES_MAX."""
REFUSED_SECONDS = 0.05
"""How long an engine that said "not running" is not asked again: its membership is on its way."""
COMMANDS_KEPT_MAX = 256
"""Finished commands whose outcome can still be asked for by (owner, command_id)."""
COMMANDS_UNDER_WAY_MAX = 64
COORDINATOR_STATE_BYTES_MAX = 16 << 20
"""A thousand members with their facts, and all kept commands, are about one megabyte."""
RECOVERING_SECONDS_MAX = 3.0
"""What a coordinator without its state listens before it speaks: three heartbeats of whoever lives."""
STREAM_TOKENS_BUFFER_MAX = 65536

# --- lockstep groups ---------------------------------------------------------------------------------------------
LOCKSTEP_STEPS_AHEAD_MAX = 2
"""Granted beyond the slowest rank: one to run, one to hide the round trip; each more is a step longer until PAUSED."""
LOCKSTEP_STEP_SECONDS = 5.0
LOCKSTEP_SECONDS_PER_TOKEN = 0.02
"""A step's deadline: five seconds and 20 ms a token, so that an 8k prefill on two cores is not taken for a freeze."""
LOCKSTEP_FENCE_SECONDS_MAX = 5.0

# --- snapshots ---------------------------------------------------------------------------------------------------
SNAPSHOT_SCOPES_MAX = 4096
"""Requests whose snapshots one store keeps; each holds one directory descriptor, and 1024 is the usual soft limit of a process
(the driver raises it or takes fewer)."""
SNAPSHOT_ITEMS_MAX = 65536
"""Snapshots of one store that take room in memory, under the live root or in the trash."""
SNAPSHOT_ITEM_BYTES_MAX = 1 << 34
SNAPSHOT_MEMORY_BYTES_MAX = 1 << 30
"""Accepted and not yet written: oMLX's queue of 128 items could hold 14 GB."""
SNAPSHOT_DISK_BYTES_MAX = 1 << 36
"""Accepted, written, or in the trash and not yet emptied: one 234k-token prefill of a hybrid model writes 12 GB."""
SNAPSHOT_WRITE_SECONDS_MAX = 30.0
"""From acceptance to durable; beyond it the snapshot is reported failed and its writer is suspected."""

# --- endpoints ---------------------------------------------------------------------------------------------------
HANDSHAKE_SECONDS_MAX = 10.0
"""From an endpoint's first word to CONNECTED. Mooncake: waiters 10 s, the call they wait for 60 s, hence its #3584."""
ENDPOINT_SILENCE_SECONDS_MAX = SILENCE_SECONDS_MAX
"""The heartbeat lease: for no longer is an endpoint half-open."""
LANE_PATIENCE_SECONDS = 0.25
"""After one lane is ready, how long the chooser waits for the others before it lists what there is."""
LANES_PER_ENDPOINT_MAX = 16
LANE_PARAMETERS_BYTES_MAX = 4096

# --- HTTP --------------------------------------------------------------------------------------------------------
HTTP_BODY_BYTES_MAX = 8 * 1024 * 1024
STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 512
CHOICES_MAX = 16
LOGPROBS_MAX = 20
HTTP_BODIES_BYTES_MAX = 256 * 1024 * 1024
"""All bodies being read or validated at once; beyond it a request is answered 429."""
HTTP_BODY_SECONDS_MAX = 30.0
HTTP_SEND_SECONDS_MAX = 60.0
"""A client that takes nothing for so long is gone; nginx's send_timeout."""
HTTP_CONNECTIONS_MAX = 8192
HTTP_HEADERS_WAIT_SECONDS = 10.0
"""How long a stream's headers wait for its first token, so that a refusal is still an HTTP status and not an event."""
PROMPTS_PER_REQUEST_MAX = 128
GENERATIONS_PER_REQUEST_MAX = 256
"""Prompts times choices of one HTTP request."""
CHAT_MESSAGES_MAX = 4096
LOGIT_BIAS_MAX = 1024
STOP_TOKEN_IDS_MAX = 256
TENANT_CHARS_MAX = 256
HTTP_BODY_INLINE_BYTES_MAX = 256 * 1024
"""A longer body is decoded off the loop: a million token ids take some 20 ms."""
TOKENIZE_INLINE_CHARS_MAX = 4096
"""A longer text is tokenised off the loop: at some MB/s it would hold every stream up for more than a millisecond."""

# --- text --------------------------------------------------------------------------------------------------------
MODEL_TEXT_FILE_BYTES_MAX = 256 * 1024 * 1024
"""tokenizer.json and its like; the largest public one has 34 MB."""
PROMPT_CHARS_MAX = 16 * 1024 * 1024
"""Of a rendered chat: twice what a body of HTTP_BODY_BYTES_MAX can hold, for the template's own words."""
CHAT_TEMPLATE_STEPS_MAX = 1_000_000
"""Loop items of one rendering: about a second of Python."""
