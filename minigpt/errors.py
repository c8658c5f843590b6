"""One family of errors: whatever goes wrong for a user is a `MinigptError` with a one-line message.

A message names the offending value, the allowed range and the next step; the command line prints it as it is.
"""

from __future__ import annotations


class MinigptError(Exception):
    """Base of every error that minigpt raises on purpose."""


class FormatError(MinigptError):
    """A file is not a readable `.mgpt` file: foreign, damaged, or of a newer version."""


class EncodingError(MinigptError):
    """The parts of an encoded matrix do not fit its shape or hold values outside their range."""


class ConfigError(MinigptError):
    """A configuration contradicts itself or the weights it comes with."""


class ConversionError(MinigptError):
    """A foreign checkpoint cannot be represented as a minigpt model."""


class TokenizerError(MinigptError):
    """A vocabulary is inconsistent, or an id lies outside it."""


class ContextError(MinigptError):
    """More tokens than the positions that the model was trained with."""


class BackendError(MinigptError):
    """The requested backend is unknown or cannot be loaded here."""


class OptionError(MinigptError, ValueError):
    """An argument or option has a value outside its allowed range."""
