"""The errors of every room, and the checks that raise them."""


class ConfigError(ValueError):
    """A setting is wrong; the message names its key, its value and the remedy."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise `ConfigError` naming `key` and `value` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value!r}: {remedy}")


class WeightsError(ConfigError):
    """A model's files are wrong; the message names the file, the tensor or key, and the remedy."""


class ChatError(ConfigError):
    """A tokenizer, a template or a conversation is wrong; the message names the remedy."""


class PromptError(ValueError):
    """A prompt can't be read; the message names where it stands and the remedy."""


class DataError(ValueError):
    """Prompts or anchors can't be used; the message names which and the remedy."""


class TeacherError(RuntimeError):
    """The teacher can't be used as it is set: asking again would not help."""


class StoreError(RuntimeError):
    """The anchor store can't be read or written; the message names the file and the remedy."""


class CheckpointError(RuntimeError):
    """A checkpoint can't be saved or used; the message names it and the remedy."""


class NonFiniteError(RuntimeError):
    """Losses or gradients stayed non-finite; the message says where the batches were saved."""


class StopRequested(Exception):
    """The run was asked to stop, and has saved its state; the message says where it stands."""
