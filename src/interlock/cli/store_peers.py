"""Options of `interlock store run` and `interlock serve` for a node that reads the blocks of nodes on other hosts, and is read by them."""

from __future__ import annotations

import argparse
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from interlock.cli.errors import Failure, Usage

if TYPE_CHECKING:
    from interlock.store.peer_links import PeersConfig

TOKEN_BYTES_MIN = 16
TOKEN_BYTES_MAX = 4096
WORDS = "Blocks that this node lacks and a peer has are read from there, verified, and kept here."
EXAMPLE = """\
two hosts that share their blocks:
  a$ interlock store run --address unix:/run/me/kv.sock --name a --peers-token-file fleet.token \\
       --peers-address tcp:10.0.0.5:7400 --peer b=tcp:10.0.0.6:7400
  b$ interlock store run --address unix:/run/me/kv.sock --name b --peers-token-file fleet.token \\
       --peers-address tcp:10.0.0.6:7400 --peer a=tcp:10.0.0.5:7400
Whoever has the token can read every block, whichever tenant's.
"""
TOKEN_WORDS = (
    f"the secret of all these nodes, at least {TOKEN_BYTES_MIN} bytes, in a file that only you can read; needed for tcp:. "
    "It and look-ups cross the network unencrypted where there is no TLS"
)
TLS_WORDS = {
    "certificate": "this node's certificate, PEM: all that passes between nodes over tcp: then goes under TLS",
    "key": "its private key",
    "authority": "whose signature makes a peer's certificate a good one",
}


def add_options(run_node: argparse.ArgumentParser) -> None:
    """For `store run`, with an example of two hosts below its help."""
    run_node.formatter_class, run_node.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    peers = run_node.add_argument_group("blocks of other hosts", WORDS)
    peers.add_argument(
        "--name",
        default="store",
        help="this node's name among its peers (default 'store'; every node another)",
    )
    peers.add_argument(
        "--peers-address",
        metavar="tcp:HOST:PORT",
        help="where peers reach this node: an address of this host, no wildcard; block bytes go over further ports of it, which the kernel chooses. "
        "unix:/PATH for nodes of one machine",
    )
    peers.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=ADDRESS",
        help="a node whose blocks are read, and its --peers-address; only NAME with --coordinator. May be repeated",
    )
    peers.add_argument(
        "--coordinator",
        default="",
        metavar="ADDRESS",
        help="tell this coordinator where this node is, and ask it where the peers are",
    )
    peers.add_argument(
        "--peers-token-file",
        type=Path,
        metavar="FILE",
        help=TOKEN_WORDS,
    )
    for part, words in TLS_WORDS.items():
        peers.add_argument(f"--peers-tls-{part}", metavar="FILE", help=words)


def add_serve_options(serve: argparse.ArgumentParser) -> None:
    """For a fleet's own node: the same, with names that say whose they are."""
    peers = serve.add_argument_group("blocks of other hosts", WORDS)
    peers.add_argument(
        "--store-name",
        default="store",
        metavar="NAME",
        help="the store node's name among its peers (default 'store'; every fleet's another)",
    )
    peers.add_argument(
        "--store-listen",
        metavar="tcp:HOST:PORT",
        help="where other fleets' nodes reach this one's: an address of this host, no wildcard",
    )
    peers.add_argument(
        "--store-peer",
        action="append",
        default=[],
        metavar="NAME=ADDRESS",
        help="a node whose blocks are read: its --store-name and --store-listen. May be repeated",
    )
    peers.add_argument("--store-token-file", type=Path, metavar="FILE", help=TOKEN_WORDS)
    for part, words in TLS_WORDS.items():
        peers.add_argument(f"--store-tls-{part}", metavar="FILE", help=words)


def config_of(arguments: argparse.Namespace) -> PeersConfig | None:
    """None: the node is alone. Raises `Usage` for what does not go together, `Failure` for a token that cannot be had."""
    tls = [getattr(arguments, f"peers_tls_{part}") for part in TLS_WORDS]
    if arguments.peers_address is None:
        if arguments.peer or arguments.coordinator or arguments.peers_token_file or any(tls):
            raise Usage("peers need --peers-address tcp:HOST:PORT, where they reach this node")
        return None
    peers = _peers(arguments.peer, "--peer")
    token = arguments.peers_token_file
    return _config(
        arguments.name, arguments.peers_address, peers, token, tls, "--peers-tls", arguments.coordinator
    )


def config_of_fleet(arguments: argparse.Namespace) -> PeersConfig | None:
    """As `config_of`, from the options of `add_serve_options`."""
    tls = [getattr(arguments, f"store_tls_{part}") for part in TLS_WORDS]
    if arguments.store_listen is None:
        if arguments.store_peer or arguments.store_token_file or any(tls):
            raise Usage(
                "--store-peer needs --store-listen tcp:HOST:PORT, where peers reach this fleet's node"
            )
        return None
    peers = _peers(arguments.store_peer, "--store-peer")
    token = arguments.store_token_file
    return _config(arguments.store_name, arguments.store_listen, peers, token, tls, "--store-tls", "")


def _config(
    name: str,
    address: str,
    peers: dict[str, str],
    token_file: Path | None,
    tls: list[str | None],
    tls_option: str,
    coordinator: str,
) -> PeersConfig:
    from interlock.host.bulk_tls import TlsFiles
    from interlock.store.peer_links import PeersConfig

    given = [file for file in tls if file]
    if given and len(given) < len(tls):
        raise Usage("TLS needs " + ", ".join(f"{tls_option}-{part}" for part in TLS_WORDS) + " together")
    config = PeersConfig(
        address=address,
        peers=peers,
        coordinator=coordinator,
        token=_token(token_file) if token_file is not None else b"",
        tls=TlsFiles(*given) if given else None,
    )
    try:
        config.check(name)
    except ValueError as error:
        raise Usage(str(error)) from error
    return config


def _peers(words: list[str], option: str) -> dict[str, str]:
    """Addresses by name; an empty one for the coordinator to tell. Raises `Usage`."""
    peers: dict[str, str] = {}
    for word in words:
        name, equals, address = word.partition("=")
        if not name or (equals and not address):
            raise Usage(f"{option} {word} is not NAME=ADDRESS, as in b=tcp:10.0.0.6:7400")
        if name in peers:
            raise Usage(f"{option} {name} is given twice")
        peers[name] = address
    return peers


def _token(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            token = file.read(TOKEN_BYTES_MAX + 1).strip()
    except OSError as error:
        raise Failure(f"store: the token in {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise Failure(f"store: others can read the token in {path}; chmod 600 it")
    if not TOKEN_BYTES_MIN <= len(token) <= TOKEN_BYTES_MAX:
        raise Failure(
            f"store: {path} must hold {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} bytes of token, not {len(token)}; "
            f"`openssl rand -hex 32` makes one"
        )
    return token
