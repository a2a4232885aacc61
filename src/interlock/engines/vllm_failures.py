"""Why vLLM could not start, in one sentence: found in the exception, or in what its core has printed above it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

CAUSE = re.compile(
    r"(?:^|\s)(?:[\w.]+\.)?(\w*(?:Error|Exception|UnsupportedEngine|UnknownModel)): (?P<words>.+)$", re.M
)
EMPTY = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "Cancelled",
    "Executor failed",
)
HINTS: Sequence[tuple[str, Callable[[str], str]]] = (
    (
        "are not supported for now",
        lambda words: f"vLLM does not support this model: {words}",
    ),
    (
        "does not recognize this architecture",
        lambda words: f"vLLM does not support this model: {words.removeprefix('Value error, ')}",
    ),
    (
        "KV cache is needed, which is larger than the available",
        lambda words: (
            f"{words.partition(' Try increasing')[0]} "
            "Pass a smaller --max-model-len or a larger --kv-cache-memory-bytes after --"
        ),
    ),
    (
        "Available memory on node",
        lambda words: f"{words} Use fewer --engines, or a smaller --kv-cache-memory-bytes after --",
    ),
)


def explain_failure(error: BaseException, log: str) -> str:
    """One sentence for the operator: the first real cause, from the exception or from what the core printed."""
    words = first_line(error)
    if not words or any(empty in words for empty in EMPTY):
        causes = [m["words"].strip() for m in CAUSE.finditer(log)]
        real = [c for c in causes if not any(empty in c for empty in EMPTY)]
        words = real[-1] if real else words or type(error).__name__
    if re.search(r"'\w+': -9\b", str(error)):
        return (
            "a process of it was killed by the system while it started, most likely for want of memory; "
            "use fewer --engines, a smaller model, or a smaller --kv-cache-memory-bytes after --"
        )
    if isinstance(error, MemoryError):
        return f"there is not enough memory to start this engine: {words}; use fewer --engines or a smaller model"
    for part, explain in HINTS:
        if part in words:
            return explain(words)
    return f"vLLM says: {words.removeprefix('Value error, ')}"


def first_line(error: BaseException) -> str:
    """The sentence of an error that says what is wrong, for an operator; "" where there is none."""
    text = re.sub(
        r"\s*\[type=\w+, input_value=.*?\]\s*$", "", str(error), flags=re.M
    )  # pydantic's own detail
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    # Pydantic's first line only counts the faults; the sentence is in the third.
    if "validation error" in lines[0] and len(lines) > 1:
        return next((line for line in lines if "Value error" in line or "Assertion" in line), lines[-1])
    return lines[0]
