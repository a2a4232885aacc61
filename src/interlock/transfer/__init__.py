"""KV memory between peers, over endpoints that survive anything (DESIGN §7).

The modules, from the outside in:

* `engine`: `TransferEngine`, the asynchronous face; `blocking`: the synchronous one.
* `memory`: where any buffer lies (NumPy, torch, slabs); `segments`: what of it peers may read, and who reads it now;
  `pieces`: thousands of scattered pieces as arrays; `outcomes`: one transfer, its outcome and its release.
* `reading`: finds lanes for a transfer, and others when one breaks; `pulling`: a write, as the owner's read; `notices`:
  notifications, acknowledged and delivered once.
* `peer`: all that this process has of one peer: `endpoint` drives core/endpoints, `link` carries its messages; `peer_store` bounds
  their number; `gate` admits the connections of lanes.
* `lanes/`: what carries bytes. `lanes/base` says what a lane is; `tcp`, `shm`, `nixl` are.

A read walks so: engine.read makes a Plan of its pieces and a Transfer; reading asks the peer's endpoint to be connected; a lane
takes chunks of the transfer, one a connection; the owner's end checks each piece against its segments and sends; the last chunk
decides the outcome, and the last thread that could have written a byte, the release.
"""
