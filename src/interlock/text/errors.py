"""What can be wrong with a model's text files, and with a text that somebody wants as a prompt."""

from __future__ import annotations

from interlock.core.errors import InterlockError


class ModelFilesError(InterlockError):
    """The model directory cannot serve text: a file is missing, too large or not what its name says."""


class PromptError(InterlockError):
    """This text or conversation cannot become a prompt of this model; its author must change it."""
