"""The configuration of an OpenAI Realtime transcription session: read, checked, told back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nar_speech.errors import AudioError
from nar_speech.server.api_error import ApiError, bad_request
from nar_speech.server.audio_in import AudioIn
from nar_speech.server.formats import language_code
from nar_speech.server.forms import hotwords, words_of_prompt
from nar_speech.server.live import Endpoint, Wish

PCM_RATE, G711_RATE = 24_000, 8_000
LOG_PROBS = "item.input_audio_transcription.logprobs"
DELAYS = ("minimal", "low", "medium", "high", "xhigh")
# There is no model of whether a sentence is complete here: eagerness sets the silence that ends it.
EAGERNESS = {"low": 1.2, "medium": 0.8, "auto": 0.8, "high": 0.5}
_OLD_FORMATS = {
    "pcm16": {"type": "audio/pcm", "rate": PCM_RATE},
    "g711_ulaw": {"type": "audio/pcmu"},
    "g711_alaw": {"type": "audio/pcma"},
}
_ENCODINGS = {"audio/pcm": "s16le", "audio/pcmu": "mulaw", "audio/pcma": "alaw"}


@dataclass(frozen=True)
class RealtimeConfig:
    """A session as the client configured it.

    ``endpoint`` None: the client commits. ``turn`` and ``transcription`` are told back as they were given.
    """

    model: str | None = None
    encoding: str = "audio/pcm"
    rate: int = PCM_RATE
    transcription: dict[str, Any] = field(default_factory=dict)
    turn: dict[str, Any] | None = field(
        default_factory=lambda: {
            "type": "server_vad",
            "threshold": 0.5,
            "prefix_padding_ms": 300,
            "silence_duration_ms": 500,
        }
    )
    noise_reduction: dict[str, Any] | None = None
    include: tuple[str, ...] = ()

    def updated(self, session: Any) -> RealtimeConfig:
        """With what a ``session`` object changes; unknown fields are ignored, as OpenAI's clients expect.

        Raises:
            ApiError: 400, a field with a value that is not allowed.
        """
        session = _mapping(session, "session")
        if session.get("type", "transcription") != "transcription":
            raise bad_request("session.type: this server transcribes; use 'transcription'", "session.type")
        audio = _mapping(session.get("audio"), "session.audio")
        given = dict(_mapping(audio.get("input"), "session.audio.input"))
        for old, new in (  # fields of the beta API
            ("input_audio_transcription", "transcription"),
            ("turn_detection", "turn_detection"),
            ("input_audio_noise_reduction", "noise_reduction"),
            ("input_audio_format", "format"),
        ):
            if old in session:
                given.setdefault(new, session[old])
        config = self
        if "format" in given:
            config = config._with_format(given["format"])
        if given.get("transcription") is not None:
            config = config._with_transcription(_mapping(given["transcription"], "transcription"))
        elif isinstance(session.get("model"), str):
            config = replace(config, model=session["model"])
        if "turn_detection" in given:
            turn = given["turn_detection"]
            config = replace(config, turn=None if turn is None else dict(_mapping(turn, "turn_detection")))
        if "noise_reduction" in given:
            noise = given["noise_reduction"]
            config = replace(
                config, noise_reduction=None if noise is None else dict(_mapping(noise, "noise_reduction"))
            )
        if session.get("include") is not None:
            config = replace(config, include=_strings(session["include"], "include"))
        config.wish()  # raises what is wrong with it
        return config

    def _with_format(self, given: Any) -> RealtimeConfig:
        param = "session.audio.input.format"
        if isinstance(given, str):
            if given not in _OLD_FORMATS:
                raise bad_request(f"{param}: '{given[:40]}' is not one of {', '.join(_OLD_FORMATS)}", param)
            given = _OLD_FORMATS[given]
        given = _mapping(given, param)
        kind = given.get("type", self.encoding)
        if kind not in _ENCODINGS:
            raise bad_request(
                f"{param}.type: '{str(kind)[:40]}' is not one of {', '.join(_ENCODINGS)}", f"{param}.type"
            )
        rate = given.get("rate", PCM_RATE if kind == "audio/pcm" else G711_RATE)
        try:
            AudioIn(_ENCODINGS[kind], rate, 16_000)
        except (AudioError, TypeError) as error:
            raise bad_request(f"{param}.rate: {error}", f"{param}.rate") from error
        return replace(self, encoding=kind, rate=rate)

    def _with_transcription(self, given: Mapping[str, Any]) -> RealtimeConfig:
        for name in ("model", "language", "prompt"):
            if not isinstance(given.get(name, ""), str | None):
                raise bad_request(f"transcription.{name}: must be text", f"transcription.{name}")
        for name in ("languages", "keywords"):
            if given.get(name) is not None:
                _strings(given[name], f"transcription.{name}")
        delay = given.get("delay")
        if delay is not None and delay not in DELAYS:
            raise bad_request(
                f"transcription.delay: must be one of {', '.join(DELAYS)}", "transcription.delay"
            )
        known = ("model", "language", "languages", "prompt", "keywords", "delay")
        kept = {**self.transcription, **{k: v for k, v in given.items() if k in known}}
        return replace(self, transcription=kept, model=kept.get("model") or self.model)

    @property
    def logprobs(self) -> bool:
        """Whether log probabilities are wanted."""
        return LOG_PROBS in self.include

    def audio(self, target: int) -> AudioIn:
        """Decoder of this session's audio."""
        return AudioIn(_ENCODINGS[self.encoding], self.rate, target)

    def endpoint(self) -> Endpoint | None:
        """When utterances end; None: when the client commits.

        Raises:
            ApiError: 400.
        """
        if self.turn is None:
            return None
        kind = self.turn.get("type", "server_vad")
        if kind == "semantic_vad":
            eagerness = self.turn.get("eagerness") or "auto"
            if eagerness not in EAGERNESS:
                raise bad_request(f"turn_detection.eagerness: must be one of {', '.join(EAGERNESS)}")
            return Endpoint(silence=EAGERNESS[eagerness])
        if kind != "server_vad":
            raise bad_request(
                "turn_detection.type: must be server_vad, semantic_vad, or turn_detection null",
                "turn_detection.type",
            )

        def of(name: str, default: float, scale: float) -> Any:
            value = self.turn.get(name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return default if value is None else value * scale if number else value

        threshold = of("threshold", 0.5, 1)
        silence, prefix = of("silence_duration_ms", 0.5, 1e-3), of("prefix_padding_ms", 0.3, 1e-3)
        try:
            return Endpoint(threshold, silence, prefix)
        except ApiError as error:
            raise bad_request(f"turn_detection: {error.message}", "turn_detection") from error

    def wish(self) -> Wish:
        """The session as any protocol would ask for it.

        Raises:
            ApiError: 400.
        """
        given = self.transcription
        languages = given.get("languages") or ()
        language = given.get("language") or (languages[0] if languages else "")
        words = hotwords(list(given.get("keywords") or ()), "transcription.keywords")
        hints = words_of_prompt(given.get("prompt") or "")
        return Wish(language_code(language) or None, words, hints, self.endpoint())

    def body(self, session_id: str, expires: int | None = None) -> dict[str, Any]:
        """The ``session`` object that the server tells."""
        form: dict[str, Any] = {"type": self.encoding}
        if self.encoding == "audio/pcm":
            form["rate"] = self.rate
        transcription = {"language": None, "prompt": "", **self.transcription, "model": self.model}
        body = {
            "type": "transcription",
            "object": "realtime.transcription_session",
            "id": session_id,
            "audio": {
                "input": {
                    "format": form,
                    "transcription": transcription,
                    "noise_reduction": self.noise_reduction,
                    "turn_detection": self.turn,
                }
            },
            "include": list(self.include) or None,
        }
        return body if expires is None else {**body, "expires_at": expires}


def _mapping(value: Any, param: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise bad_request(f"{param}: must be an object", param)
    return value


def _strings(value: Any, param: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise bad_request(f"{param}: must be a list of texts", param)
    return tuple(value)
