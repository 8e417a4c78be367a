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


class MissingExtraError(NarSpeechError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed:"
            f" pip install 'nar-speech[{extra}]'"
        )
