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
CONNECTIONS_MAX = 4096
"""Of one listener: those of ENDPOINTS_MAX peers, and as many that dial anew while their old ones are still being closed."""
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
EVENTS_PER_CALL_MAX = 512
"""Events in one answer: with all their fields they still fit into one frame."""
EVENT_FIELD_CHARS_MAX = 512
"""Of one field's text: some errors quote their whole input, and an event is a line."""
EVENTS_FILE_BYTES_MAX = 64 * 1024 * 1024
"""EVENTS_KEPT_MAX lines of many long fields; a longer file is none of ours."""
EVENTS_WAIT_SECONDS_MAX = 30.0
"""How long a question for events waits for one; the asker then asks again."""
METRIC_SERIES_MAX = 1024
"""Label combinations of one metric: beyond it a label carries something unbounded, which is a defect."""

# --- store -------------------------------------------------------------------------------------------------------
BLOCKS_PER_CALL_MAX = 8192
"""A 262k-token prompt at 32 tokens a block."""
HEADS_MAX = 1024
RANKS_MAX = 1024
LAYERS_MAX = 4096
LAYER_GROUPS_MAX = 64
"""Stages of a pipeline; each makes every block's look-up longer by a checksum per head."""
CHECKSUMS_PER_BLOCK_MAX = 8192
SCALES_MAX = 16
"""Per layer and head: K and V have one each, two formats two each."""
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
TENANTS_WITH_QUOTA_MAX = 256
"""Tenants with a quota that have blocks here: each has an eviction order, and making room looks at all of them."""
PINNED_SHARE_MAX = 0.5
"""Of the slab: what is pinned cannot make room for what is used."""
PIN_SECONDS_MAX = 3600.0
PINS_PER_OWNER_MAX = 256
CHANGES_KEPT_MAX = 65536
"""Changes of the index that a watcher can catch up on; more, and he lists the blocks again."""
CHANGES_PER_CALL_MAX = 4096
WATCH_SECONDS_MAX = 30.0
"""How long a question for changes waits for one; the asker then asks again."""
KV_EVENT_BATCHES_MAX = 10_000
"""Batches of KV events kept for who missed some; vLLM's own default."""
KV_EVENT_BYTES_MAX = 64 * 1024 * 1024
"""The same bound in bytes: a batch tells of up to CHANGES_PER_CALL_MAX changes."""
KV_EVENT_TOKENS_BYTES_MAX = 256 * 1024 * 1024
"""Tokens of blocks kept for KV events, where they are published: of some 800,000 blocks of 16 tokens."""
BLOCK_TOKENS_MAX = 4096
"""Tokens of one block, where a message carries them; vLLM's blocks have 16 to 1024."""
BLOCKS_LISTED_MAX = 4096
"""Slots looked at for one page of a listing or one slice of a sweep: some milliseconds, in which no look-up is answered."""
BLOCKS_VERIFIED_MAX = 256
FROZEN_WRITER_SECONDS = 10.0
"""How long a process keeps slots of an ended session, neither reporting nor ending, before it counts as frozen."""
EXTENT_BYTES_MAX = 64 * 1024 * 1024
"""A slab has at least 16 extents; taking one from another layout evicts all that stands in it."""
EXTENTS_MAX = 1024
PENDING_REPORTS_MAX = 4096
"""Reports a rank keeps until the node has acknowledged them; the node itself allows fewer sessions than that."""
REPORT_RETRY_SECONDS = 0.2

DISK_PACK_BYTES = 32 * 1024 * 1024
"""Data of one pack at most: large enough that writing is sequential, small enough that two of them in memory are cheap."""
DISK_PACK_BLOCKS_MAX = 1024
"""Blocks of one pack: its header, some 300 bytes a block and 17 a checksum, is read before the first of them, and they are
entered into the index in one go, in a millisecond."""
DISK_PACK_HEADER_BYTES_MAX = 64 * 1024 * 1024
"""A longer header is no pack of ours; safetensors itself allows 100 MB."""
DISK_BYTES_MIN = 8 * DISK_PACK_BYTES
"""Fewer packs leave the clock no choice."""
DISK_PACKS_MAX = 65536
"""Files of one directory: a listing of them takes some 0.2 s at start."""
DISK_FLUSH_SECONDS = 2.0
"""A block waits so long for others to share its pack with; what a killed node loses."""
DISK_QUEUE_BLOCKS_MAX = 65536
DISK_WRITES_AT_ONCE_MAX = 2
"""Packs being written: while one is copied and checked, the other's bytes go to the disk."""
DISK_READS_AT_ONCE_MAX = 2
"""One batch is copied while the next is read; more gain nothing (measured). Of HOST_THREADS_MAX threads, so that a disk that hangs leaves some to the rest of the node."""
DISK_READ_BYTES = 8 * 1024 * 1024
"""One batch of a promotion, in memory of its own until it is verified."""
DISK_PROMOTED_BLOCKS_MAX = 8192
"""Blocks on their way from disk to RAM; beyond it a look-up is told of no more."""
DISK_TOCS_KEPT_MAX = 256
"""Tables of contents of packs kept in memory; one has about 200 bytes a block."""
DISK_BAD_BLOCKS_MAX = 3
"""So many blocks of one pack fail their check, and the whole pack is set aside: its medium is not to be trusted."""
DISK_ASIDE_FILES_MAX = 8
"""Packs set aside that are kept; the oldest leaves first."""
DISK_FAILURES_MAX = 3
"""So many reads fail in a row, and the disk is left alone until a probe."""
DISK_RETRY_SECONDS_MIN = 0.5
DISK_RETRY_SECONDS_MAX = 30.0
"""Between probes of a disk that is full or failing."""
DISK_CLOSE_SECONDS_MAX = 3.0
"""What a node that leaves takes to write what waits: less than CHILD_GRACE_SECONDS."""
DISK_INDEX_RECORDS_MIN = 65536
DISK_OPEN_SECONDS_MAX = 2.0
"""What a node waits for its disk before it serves without; listing 65,536 files and mapping the index take less."""
PROMOTION_POLL_SECONDS = 0.005
"""Between two questions about blocks that are on their way: the scheduler asks every step, which may take less."""
PROMOTION_WAIT_SECONDS_MAX = 1.0
"""How long a request waits for blocks that come from disk; then it takes what is there and computes the rest."""

LOAD_SECONDS_MAX = 10.0
"""From a rank's hearing of a load to its outcome: recomputing is then the quicker way."""
SAVES_QUEUED_MAX = 1024
"""Batches of blocks that one rank has copied out of the KV cache and not yet summed up."""
SAVE_STAGING_BUFFERS_MAX = 4
"""Of 16 MiB: beyond them the model's thread does a save's work itself, rather than wait for another."""
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
RELEASE_SECONDS_DEFAULT = 30.0
"""What the end of a pause waits for a coordinator that is away, before it says that its hold is still there."""
ATTACH_ANSWER_SECONDS_MAX = 10.0
"""What an attached vLLM server may take for a question of state; a pause or an update takes what it takes."""
ATTACH_STEP_SECONDS_MAX = 600.0
"""A step of an attached engine (a pause that waits for requests, a change of weights) that takes longer has failed."""
ATTACH_ANSWER_BYTES_MAX = 4 * 1024 * 1024
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
STEP_RETRY_SECONDS_MIN = 1.0
"""An engine's first wait before it tries a step again that failed and changed nothing; each further wait is twice as long."""
STEP_RETRY_SECONDS_MAX = 30.0
FRONT_GRACE_SECONDS = 10.0
"""How long an engine computes for a front whose connection is gone: a front is restarted and back within a few."""
NOTE_BYTES_MAX = 1024 * 1024
"""What a front leaves with an engine about one request; a longer one is left out, and dies with the front."""
HELD_BYTES_PER_CALL = 4 * 1024 * 1024
"""Of prompts and notes that an engine tells a front's new life at a time: a sixteenth of what a channel may have waiting."""
KEPT_REQUESTS_BYTES_MAX = 1 << 30
"""The requests of one engine or front on disk while the fleet is suspended; 4,096 of 8,192 tokens take 170 MB."""
TAKE_UP_SECONDS_MAX = 60.0
"""How long a stream whose front has died waits for its client, while the fleet runs; a suspended fleet stops this clock."""
RECOVERY_SECONDS_MAX = FRONT_GRACE_SECONDS
"""How long a front waits, while the fleet runs, for the engine that had a request of its last life."""
KEEP_RETRY_SECONDS = 1.0
"""Between two tries to write what a disk did not take, and between two rewrites."""
TOKENS_PER_FRAME_MAX = 8192
"""Tokens that an engine puts into one frame: with 20 logprobs each they still fit into FRAME_BYTES_MAX."""
DISPATCHES_PER_FRAME_MAX = 64
DISPATCH_BATCH_BYTES = 256 * 1024
"""Dispatches to one engine that wait together go out in one frame, up to so many and so many bytes of prompts and notes."""
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
LOCKSTEP_BEAT_SECONDS = 0.5
"""How often a leader looks at its deadline, and says again what some rank has not reported."""
LOCKSTEP_SILENCE_SECONDS_MAX = 15.0
"""A rank that is asked for something while no step runs, and whose loop is not heard for so long: its group is ended."""
LOCKSTEP_CALL_SECONDS_MAX = 30.0
"""What a rank has for taking a request in or handing it out, which it does between two steps."""
LOCKSTEP_COLLECTIVE_SECONDS_MAX = 3600.0
"""gloo's own time-out: it only has to be longer than any step's deadline, which is the leader's."""
LOCKSTEP_BLAME_SECONDS = 0.25
"""A rank's collective failed: how long another rank's exit, the likelier cause, is waited for before it is named."""

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
SNAPSHOT_CALL_SECONDS_MAX = 5.0
"""How long a save, load or erase waits while a metadata call of the same request is under way (a rename took 7 ms at worst)."""
SNAPSHOT_HUNG_WRITERS_MAX = 4
"""Writers given up as hung and not yet back; then nothing more is written until one returns: the disk is the trouble."""
SNAPSHOT_TICK_SECONDS = 0.25
"""How often late writes are looked for."""
SNAPSHOT_NOTICES_MAX = 4096
"""Notices waiting for their receiver; the oldest are dropped and counted."""
SNAPSHOT_SPARE_BYTES_MAX = 1 << 28
"""Staging memory kept for the next save: fresh pages cost as much as the copy."""
SNAPSHOT_KEPT_BYTES_MAX = 1 << 35
"""Promoted snapshots that outlive their requests; the longest unused go first."""

# --- endpoints ---------------------------------------------------------------------------------------------------
HANDSHAKE_SECONDS_MAX = 10.0
"""From an endpoint's first word to CONNECTED. Mooncake: waiters 10 s, the call they wait for 60 s, hence its #3584."""
ENDPOINT_SILENCE_SECONDS_MAX = SILENCE_SECONDS_MAX
"""The heartbeat lease: for no longer is an endpoint half-open."""
LANE_PATIENCE_SECONDS = 0.25
"""After one lane is ready, how long the chooser waits for the others before it lists what there is."""
LANES_PER_ENDPOINT_MAX = 16
LANE_PARAMETERS_BYTES_MAX = 4096

# --- transfer ----------------------------------------------------------------------------------------------------
SEGMENTS_MAX = 4096
"""Segments that one engine offers at a time; the board that readers look at has a word for each."""
PIECES_PER_TRANSFER_MAX = 65536
PIECES_PER_CALL_MAX = 1024
"""IOV_MAX of Linux: one more and sendmsg, recvmsg and process_vm_readv refuse (hazards x6)."""
PIECES_PER_REQUEST_MAX = 8192
REQUEST_BYTES_MAX = 1 << 30
"""Bytes that one request on one connection of a lane may ask for."""
CHUNK_BYTES = 16 * 1024 * 1024
"""What one connection carries of a transfer before it takes the next part: also what another lane repeats at most."""
TRANSFER_SECONDS_DEFAULT = 30.0
TRANSFERS_UNDER_WAY_MAX = 4096
BULK_THREADS_MAX = 8
"""Threads of one process that move bytes; none ever waits for one peer longer than BULK_PATIENCE_SECONDS."""
BULK_PATIENCE_SECONDS = 0.02
LANE_STALL_SECONDS_MAX = 5.0
"""A connection that moved nothing for so long, though asked to, is broken: its bytes go another way."""
LANE_DIAL_SECONDS_MAX = 8.0
"""Less than a handshake may take, and enough for a peer that a thousand others dial as well."""
LANE_CONNECTIONS_MAX = 4
LANE_HELLO_BYTES_MAX = 1024
GREETINGS_MAX = 1024
"""Connections of lanes that have not said who they are; one more is closed at once."""
HANDSHAKES_AT_ONCE_MAX = 256
"""Peers of one engine whose endpoints are being opened at a time; the others wait for their turn."""
ENDPOINTS_MAX = 2048
"""Endpoints of one engine; above it those that nobody uses are retired (SIEVE)."""
SEGMENT_RELEASE_SECONDS_MAX = 5.0
"""What unregistering waits for reads of the segment that are under way, before their connections are ended."""
NOTICE_BYTES_MAX = 64 * 1024
NOTICES_WAITING_MAX = 1024
NOTICES_REMEMBERED_MAX = 4096
"""Numbers of notifications, per peer, that are known to have been delivered."""
LABEL_CHARS_MAX = 128
QUESTION_BYTES_MAX = 8 * 1024 * 1024
QUESTIONS_UNDER_WAY_MAX = 64
"""Questions of one peer that are being answered; one more is refused."""
PEER_BLOCKS_KNOWN_MAX = 1 << 20
"""Blocks of other nodes whose keys one node remembers."""
PEER_BLOCKS_COMING_MAX = 4096
PEER_FETCH_BLOCKS_MAX = 256
"""Blocks in one read from another node; also bounded by DISK_READ_BYTES of staging."""
PEER_FETCH_SECONDS_MAX = 1.0
PEER_REMOVE_SECONDS_MAX = 50.0
"""For every other node to take a tenant's blocks away, before it is named as one that did not."""
REMOVALS_KEPT_MAX = 65536
"""Removals (of a tenant, of a beginning of keys) that a node remembers, for ever; one more is refused."""
REMOVALS_FILE_BYTES_MAX = 128 * 1024 * 1024
REMOVALS_TOLD_MAX = 512
"""In one message between nodes."""
REMOVAL_RETRY_SECONDS = 2.0
"""Between two tries to carry out a removal that the disk did not let through."""
PREFIX_CHARS_MAX = 64
"""Hexadecimal digits of a key's beginning: all of them."""
DIRECTORY_PEERS_MAX = 16384
DIRECTORY_LEASE_SECONDS = 15.0
"""How long the coordinator lists a peer that does not announce itself again."""

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
