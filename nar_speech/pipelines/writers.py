"""Transcripts as text, JSON, subtitles and tables. Every writer is a function of a transcript."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from nar_speech.text.postprocess import is_cjk
from nar_speech.types import Segment, Transcript, Word

CUE_CHARACTERS = 84  # two lines of 42, the usual limit of subtitles
CUE_CHARACTERS_CJK = 36  # two lines of 18 of the double width characters
CUE_SECONDS = 7.0
CUE_PAUSE = 0.8  # a pause this long begins a new cue


@dataclass(frozen=True)
class Cue:
    """One subtitle; times in seconds."""

    start: float
    end: float
    text: str


def write_txt(transcript: Transcript) -> str:
    """The text on one line."""
    return " ".join(transcript.text.split()) + "\n"


def write_json(transcript: Transcript) -> str:
    """Everything, indented."""
    return json.dumps(transcript.to_dict(), ensure_ascii=False, indent=2) + "\n"


def write_jsonl(transcript: Transcript) -> str:
    """Everything on one line."""
    return json.dumps(transcript.to_dict(), ensure_ascii=False) + "\n"


def write_srt(transcript: Transcript) -> str:
    """SubRip subtitles: numbered cues, ``HH:MM:SS,mmm``, a blank line after each."""
    lines = []
    for number, cue in enumerate(make_cues(transcript), start=1):
        lines += [str(number), f"{clock(cue.start, ',')} --> {clock(cue.end, ',')}", cue.text, ""]
    return "".join(f"{line}\n" for line in lines)


def write_vtt(transcript: Transcript) -> str:
    """WebVTT subtitles: ``HH:MM:SS.mmm``; ``&``, ``<`` and ``>`` are escaped as the format asks."""
    lines = ["WEBVTT", ""]
    for cue in make_cues(transcript):
        text = cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        lines += [f"{clock(cue.start, '.')} --> {clock(cue.end, '.')}", text, ""]
    return "".join(f"{line}\n" for line in lines)


def write_tsv(transcript: Transcript) -> str:
    """A table: start and end in whole milliseconds, and text, of each segment; the first line names them."""
    rows = ["start\tend\ttext"]
    rows += [f"{_ms(s.start)}\t{_ms(s.end)}\t{' '.join(s.text.split())}" for s in transcript.segments]
    return "".join(f"{row}\n" for row in rows)


def write_words(transcript: Transcript) -> str:
    """A table of words: start and end in seconds, confidence, and the word."""
    return "".join(f"{w.start:.3f}\t{w.end:.3f}\t{w.confidence:.3f}\t{w.text}\n" for w in transcript.words)


WRITERS: dict[str, Callable[[Transcript], str]] = {
    "txt": write_txt,
    "json": write_json,
    "jsonl": write_jsonl,
    "srt": write_srt,
    "vtt": write_vtt,
    "tsv": write_tsv,
}


def make_cues(transcript: Transcript) -> Iterator[Cue]:
    """Subtitles: segments, long ones cut between words at pauses, sentence ends or the size limits."""
    for segment in transcript.segments:
        text = " ".join(segment.text.split())
        if not text:
            continue
        short = _width_fits(text) and segment.end - segment.start <= CUE_SECONDS
        if short or not segment.words:
            yield Cue(segment.start, segment.end, text)
        else:
            yield from _split(segment)


def _split(segment: Segment) -> Iterator[Cue]:
    """Cues of one long segment; each lasts from its first word to its last one."""
    held: list[Word] = []
    for word in segment.words:
        if held and _must_break(held, word):
            yield _cue(held)
            held = []
        held.append(word)
    if held:
        yield _cue(held)


def _must_break(held: Sequence[Word], word: Word) -> bool:
    if word.end - held[0].start > CUE_SECONDS or word.start - held[-1].end > CUE_PAUSE:
        return True
    if held[-1].text[-1:] in ".?!。？！" and len(held) > 2:
        return True
    return not _width_fits(join_texts(w.text for w in [*held, word]))


def _width_fits(text: str) -> bool:
    wide = sum(map(is_cjk, text))
    return wide / CUE_CHARACTERS_CJK + (len(text) - wide) / CUE_CHARACTERS <= 1


def _cue(words: Sequence[Word]) -> Cue:
    return Cue(words[0].start, words[-1].end, join_texts(w.text for w in words))


def join_texts(texts: Iterable[str]) -> str:
    """One text; a space between two parts, but not between characters of scripts that are written without."""
    joined = ""
    for text in texts:
        bare = not joined or not text or (is_cjk(joined[-1]) and is_cjk(text[0]))
        joined += text if bare else f" {text}"
    return joined


def clock(seconds: float, point: str) -> str:
    """``HH:MM:SS`` and milliseconds after ``point``; hours may have more than two digits."""
    ms = _ms(seconds)
    hours, ms = divmod(ms, 3_600_000)
    minutes, ms = divmod(ms, 60_000)
    whole, ms = divmod(ms, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{point}{ms:03d}"


def _ms(seconds: float) -> int:
    return max(round(seconds * 1000), 0)
