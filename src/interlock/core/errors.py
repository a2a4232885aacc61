"""Whose fault it is, as a type: every protocol of core/ refuses what its table lacks with one of these.

A refused event has changed nothing (each protocol's tests say so), so the caller may go on. The split by blame is h11's.
"""

from __future__ import annotations


class InterlockError(Exception):
    """A sentence for a tired operator, and its facts as `fields` for the event log.

    `peer`, `incarnation` and `attempt` say whom it concerns, `phase` what was being done. `retryable`: the same call
    may succeed later; `hint`: what to do now. Facts that the message does not say already are put behind it.
    """

    def __init__(
        self,
        message: str,
        *,
        peer: str | None = None,
        incarnation: int | None = None,
        attempt: int | None = None,
        phase: str = "",
        retryable: bool = False,
        hint: str = "",
        **fields: object,
    ) -> None:
        self.peer, self.incarnation, self.attempt = peer, incarnation, attempt
        self.phase, self.retryable, self.hint = phase, retryable, hint
        named = {"peer": peer, "incarnation": incarnation, "attempt": attempt}
        self.fields = {k: v for k, v in named.items() if v is not None} | fields
        super().__init__(_sentence(message, named, phase, hint))


def _sentence(message: str, named: dict[str, str | int | None], phase: str, hint: str) -> str:
    facts = [
        f"{name} {value}" for name, value in named.items() if value is not None and str(value) not in message
    ]
    if phase:
        facts.append(f"while {phase}")
    return message + (f" ({', '.join(facts)})" if facts else "") + (f"; {hint}" if hint else "")


class ProtocolError(InterlockError):
    """An event that the protocol does not allow in the state it met. Nothing was changed by it."""


class LocalProtocolError(ProtocolError):
    """This process used the protocol wrongly: a defect of ours."""


class RemoteProtocolError(ProtocolError):
    """A peer said what no peer of ours may say: a defect of theirs, or another version."""


class StaleError(InterlockError):
    """A newer life of the same name is known: whoever gets this about itself must stop. `highest` is that life."""

    def __init__(self, message: str, *, highest: int, **facts: object) -> None:
        super().__init__(message, highest=highest, **facts)  # type: ignore[arg-type]
        self.highest = highest


class ChannelClosed(InterlockError, ConnectionError):  # noqa: N818 - trio's naming: what is, not that it is wrong
    """The channel is closed, by either side or by a broken connection; what was asked may or may not have been done."""


class ChannelFault(InterlockError):  # noqa: N818
    """The peer refused what was asked, or failed at it; `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str, retryable: bool = False) -> None:
        super().__init__(message, retryable=retryable, code=code)
        self.code = code
        self.message = message
