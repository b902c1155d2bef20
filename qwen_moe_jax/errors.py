"""The errors a user can cause, each a single clear sentence.

The command line prints them as one line and exits with status 2. Each also derives from the built-in
type a Python caller would catch.
"""


class QwenMoeError(Exception):
    """Base class: the message says what was given, what was expected and what to do."""


class ConfigError(QwenMoeError, ValueError):
    """`config.json` asks for something this library does not implement, or contradicts itself."""


class CheckpointError(QwenMoeError, ValueError):
    """A checkpoint folder is incomplete, damaged or does not fit its configuration."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint folder, or a file that it must hold, does not exist."""


class InputError(QwenMoeError, ValueError):
    """A prompt, mask or option given to `logits`, `generate` or `stream` cannot be used."""


class EngineError(QwenMoeError, RuntimeError):
    """An engine was closed, or failed, before a request had ended."""


class ToolchainError(QwenMoeError, RuntimeError):
    """The compiler for AMD GPUs cannot be fetched, made ready or loaded on this machine."""


class MissingExtraError(QwenMoeError, ImportError):
    """Something was asked for that a package does which is not installed."""
