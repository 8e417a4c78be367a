"""The exceptions of nar_speech.

Every message is one line that names the file or field at fault and says what to do about it.
The command line turns an :class:`InputError` into exit code 2, a server into a 4xx answer.
"""


class NarSpeechError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(NarSpeechError, ValueError):
    """Something the user gave is wrong: a file, an option, a field."""


class AudioError(InputError):
    """Audio that is missing, unreadable, empty, too long or not finite."""


class ConfigError(InputError):
    """A configuration with an unknown key, a wrong type or an impossible value."""


class CheckpointError(InputError):
    """Weights that are missing, misnamed, misshaped or unsafe to load."""


class ManifestError(InputError):
    """A manifest line that can't be read or lacks a field."""


class HubError(InputError):
    """A model name that can't be resolved to a local folder."""


class TrainingError(NarSpeechError, RuntimeError):
    """Training that can't go on: losses that stay non-finite, processes that disagree."""


class SnapshotError(InputError):
    """The snapshot of a streaming session that is damaged or belongs to another model."""


class EngineError(NarSpeechError, RuntimeError):
    """The streaming engine can't do what it was asked to."""


class EngineBusy(EngineError):
    """No room for another session or job now; try again after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class BackPressure(EngineError):
    """A session has more audio waiting than it may; nothing of what was fed was taken.

    ``room`` is how many samples it would take now.
    """

    def __init__(self, message: str, room: int):
        super().__init__(message)
        self.room = room


class SessionClosed(EngineError):
    """The session takes no more audio: it was finished, cancelled, moved, evicted or it failed."""


class MissingExtraError(NarSpeechError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed:"
            f" pip install 'nar-speech[{extra}]'"
        )
