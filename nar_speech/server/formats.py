"""Transcripts in the shapes of OpenAI's transcription endpoint."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

from nar_speech.pipelines.writers import write_srt, write_txt, write_vtt
from nar_speech.text.postprocess import WORD_START
from nar_speech.types import Segment, Token, Transcript

RESPONSE_FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
WRITERS = {"text": write_txt, "srt": write_srt, "vtt": write_vtt}
TOKENS_PER_SECOND = 10  # of audio in ``usage``; OpenAI's models count as many
LEAST_CONFIDENCE = 1e-6
# OpenAI's verbose_json names languages in words.
LANGUAGE_NAMES = {
    "ar": "arabic",
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fr": "french",
    "hi": "hindi",
    "it": "italian",
    "ja": "japanese",
    "ko": "korean",
    "nl": "dutch",
    "pl": "polish",
    "pt": "portuguese",
    "ru": "russian",
    "tr": "turkish",
    "uk": "ukrainian",
    "vi": "vietnamese",
    "yue": "cantonese",
    "zh": "chinese",
}
LANGUAGE_CODES = {name: code for code, name in LANGUAGE_NAMES.items()}


def language_code(text: str) -> str:
    """``en`` of ``en``, ``EN``, ``en-US``, ``en_GB`` and ``english``."""
    text = text.strip().lower()
    return LANGUAGE_CODES.get(text, text.replace("_", "-").partition("-")[0])


def json_text(body: Any) -> str:
    """JSON that UTF-8 can hold: half a character of a client (a lone surrogate) becomes a question mark."""
    return json.dumps(body, ensure_ascii=False).encode(errors="replace").decode()


def duration_usage(seconds: float) -> dict[str, Any]:
    """``usage`` of an endpoint that counts seconds."""
    return {"type": "duration", "seconds": round(seconds, 3)}


def token_usage(transcript: Transcript) -> dict[str, Any]:
    """``usage`` of the last event of a stream, which OpenAI counts in tokens."""
    heard = math.ceil(transcript.duration * TOKENS_PER_SECOND)
    written = sum(len(s.tokens) or len(s.words) or len(s.text.split()) for s in transcript.segments)
    return {
        "type": "tokens",
        "input_tokens": heard,
        "output_tokens": written,
        "total_tokens": heard + written,
        "input_token_details": {"audio_tokens": heard, "text_tokens": 0},
    }


def json_body(transcript: Transcript, logprobs: bool = False) -> dict[str, Any]:
    """``response_format=json``."""
    body: dict[str, Any] = {"text": transcript.text, "usage": duration_usage(transcript.duration)}
    if logprobs:
        body["logprobs"] = [log_prob(t) for s in transcript.segments for t in s.tokens]
    return body


def verbose_body(
    transcript: Transcript, granularities: Sequence[str], language: str | None, temperature: float
) -> dict[str, Any]:
    """``response_format=verbose_json``; ``granularities``: ``word``, ``segment``, both or (segment) none."""
    code = transcript.language or language or ""
    body: dict[str, Any] = {
        "task": "transcribe",
        "language": LANGUAGE_NAMES.get(code, code),
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
    }
    if "segment" in granularities or not granularities:
        body["segments"] = [
            segment_body(number, segment, temperature) for number, segment in enumerate(transcript.segments)
        ]
    if "word" in granularities:
        body["words"] = [
            {"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in transcript.words
        ]
    body["usage"] = duration_usage(transcript.duration)
    return body


def segment_body(number: int, segment: Segment, temperature: float) -> dict[str, Any]:
    """One of ``segments``. No speech probability is computed: text that is there was heard."""
    coded = segment.text.encode()
    logs = [math.log(max(t.confidence, LEAST_CONFIDENCE)) for t in segment.tokens]
    mean = sum(logs) / len(logs) if logs else math.log(max(segment.confidence, LEAST_CONFIDENCE))
    return {
        "id": number,
        "seek": round(segment.start * 100),
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": [t.id for t in segment.tokens],
        "temperature": temperature,
        "avg_logprob": round(mean, 4),
        "compression_ratio": round(len(coded) / len(zlib.compress(coded)), 4) if coded else 0.0,
        "no_speech_prob": 0.0,
    }


def log_prob(token: Token) -> dict[str, Any]:
    """One of ``logprobs``; tokens as they read, with the space before a word."""
    text = token.text.replace(WORD_START, " ")
    return {
        "token": text,
        "bytes": list(text.encode()),
        "logprob": round(math.log(max(token.confidence, LEAST_CONFIDENCE)), 4),
    }
