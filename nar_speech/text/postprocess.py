"""From recognised pieces to words and readable text, as FunASR does it.

Sources: FunASR ``sentence_postprocess`` (Chinese characters, ``@@`` pieces, spelled abbreviations) and
``rich_transcription_postprocess`` (SenseVoice's language, emotion and event tags).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nar_speech.errors import InputError

SPECIAL_PIECES = frozenset({"<blank>", "<blk>", "<pad>", "<s>", "</s>", "<sos>", "<eos>", "<sos/eos>"})
UNKNOWN_PIECES = frozenset({"<unk>", "<OOV>"})
OFFICIAL_SPECIAL_PIECES = frozenset({"<s>", "</s>", "<unk>", "<OOV>"})  # what FunASR leaves out
WORD_START = "\u2581"  # sentencepiece's mark of a word's beginning
JOINER = "@@"  # subword-nmt's mark of a piece that the next one continues

# Ideographs and kana: written without spaces.
CJK = "[\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_CJK = re.compile(CJK)
_CJK_OR_RUN = re.compile(f"({CJK})")
_TAG = re.compile(r"<\|[^|<>]*\|>")


def is_cjk(character: str) -> bool:
    """Whether one character belongs to a script written without spaces (Chinese, Japanese)."""
    return _CJK.match(character) is not None


def is_special(piece: str) -> bool:
    """Whether a piece stands for no text: blank, sentence marks, unknown, ``<|tags|>``."""
    return piece in SPECIAL_PIECES or piece in UNKNOWN_PIECES or _TAG.fullmatch(piece) is not None


@dataclass(frozen=True)
class PieceGroup:
    """A word and the pieces it is made of.

    Args:
        text: the word.
        begin, end: its place, in pieces: 2.0 to 2.5 is the first half of piece 2.
        spaced: whether a space separates it from a neighbour that is spaced too.
    """

    text: str
    begin: float
    end: float
    spaced: bool


def group_pieces(pieces: Sequence[str]) -> list[PieceGroup]:
    """Words of a character vocabulary with ``@@`` pieces; special pieces are left out.

    A Chinese character or a digit is a word. ``hel@@ lo`` is one word. Two or more single letters in a row
    are one upper-case abbreviation (``u s`` gives ``US``). Punctuation joins the word before it.
    """
    groups: list[PieceGroup] = []
    parts, begin, previous = "", 0, -1  # an unfinished @@ word, its first piece, and its latest piece

    def close() -> None:
        nonlocal parts
        if parts:
            groups.append(PieceGroup(parts, begin, previous + 1, True))
        parts = ""

    for position, piece in enumerate(pieces):
        piece = piece.replace(" ", "")
        if not piece or is_special(piece):
            continue
        alone = len(piece) == 1 and (is_cjk(piece) or piece.isdecimal())
        if alone or not any(c.isalnum() or c == "'" for c in piece):
            close()
            if alone or not groups or piece == JOINER:
                groups.append(PieceGroup(piece, position, position + 1, False))
            else:
                groups[-1] = _extend(groups[-1], piece, groups[-1].end)
            continue
        if not parts:
            begin = position
        parts, previous = parts + piece.replace(JOINER, ""), position
        if JOINER not in piece:
            close()
    close()
    return _join_abbreviations(groups)


def group_sentencepieces(pieces: Sequence[str]) -> list[PieceGroup]:
    """Words of a sentencepiece vocabulary: a word begins at ``\u2581``; special pieces are left out.

    A Chinese or Japanese character is a word of its own and takes an equal part of its piece's time.
    Punctuation joins the word before it.
    """
    groups: list[PieceGroup] = []
    starting = True  # the next letters begin a word
    for position, piece in enumerate(pieces):
        if is_special(piece):
            continue
        marked = piece.startswith(WORD_START)
        starting |= marked
        text = piece.replace(WORD_START, "")
        done = 0
        for part in filter(None, _CJK_OR_RUN.split(text)):
            begin, end = position + done / len(text), position + (done + len(part)) / len(text)
            done += len(part)
            letters = any(c.isalnum() for c in part)
            if is_cjk(part):
                groups.append(PieceGroup(part, begin, end, False))
                starting = True
            elif groups and not letters and not marked:
                groups[-1] = _extend(groups[-1], part, groups[-1].end)
            elif groups and not starting:
                groups[-1] = _extend(groups[-1], part, end)
            else:
                groups.append(PieceGroup(part, begin, end, True))
                starting = False
    return groups


def join_words(groups: Sequence[PieceGroup]) -> str:
    """Text of words: spaces only between two spaced ones."""
    text, spaced = "", False
    for group in groups:
        text += (" " if spaced and group.spaced else "") + group.text
        spaced = group.spaced
    return text


def sentence_postprocess(
    pieces: Sequence[str], timestamps: Sequence[Sequence[float]] | None = None, official: bool = False
) -> tuple[str, list[list[float]] | None, list[str]]:
    """Readable text of the pieces of a FunASR character model.

    Args:
        pieces: recognised pieces, special ones included or not.
        timestamps: (begin, end) of every piece that is not special; further pairs are ignored.
        official: keep FunASR's habits where they differ: an unfinished ``@@`` word is dropped or moves behind
            later characters, punctuation takes the time of the next word, ``10 3`` is written ``103``.

    Returns:
        text (with ``timestamps``: words separated by spaces, as FunASR prints them), the words' times or
        None, the words.

    Raises:
        InputError: fewer timestamps than pieces.
    """
    if official:
        return _official_sentence([p for p in pieces if p not in OFFICIAL_SPECIAL_PIECES], timestamps)
    kept = [piece for piece in pieces if not is_special(piece)]
    groups = group_pieces(kept)
    words = [group.text for group in groups]
    if timestamps is None:
        return join_words(groups), None, words
    if len(timestamps) < len(kept):
        raise InputError(
            f"timestamps: {len(timestamps)} pairs for {len(kept)} pieces; give one for each piece"
        )
    times = [[timestamps[int(g.begin)][0], timestamps[int(g.end) - 1][1]] for g in groups]
    return " ".join(words), times, words


def sentence_postprocess_sentencepiece(
    pieces: Sequence[str], official: bool = False
) -> tuple[str, list[str]]:
    """Text and words of sentencepieces; in the words (not in the text) a lone ``i`` is written ``I``.

    ``official``: a lone word mark is an empty word, and its space stays, as in FunASR.
    """
    if official:
        kept = [piece for piece in pieces if piece not in OFFICIAL_SPECIAL_PIECES]
        first = "".join(kept[:1]).replace(WORD_START, "")
        words = [first]
        for piece in kept[1:]:
            if WORD_START in piece:
                words.append("")
            words[-1] += piece.replace(WORD_START, "")
        text = " ".join(words)
    else:
        text = "".join(piece for piece in pieces if not is_special(piece)).replace(WORD_START, " ").strip()
        words = text.split()
    return text, [re.sub(r"^i(?=$|'(?:m|ve|ll)$)", "I", word) for word in words]


def _official_characters(text: str) -> bool:
    """FunASR's test for Chinese and digits; of a whole piece it compares the strings."""
    return "\u4e00" <= text <= "\u9fff" or "0" <= text <= "9" or text == "@"


def _official_letters(text: str) -> bool:
    return text == "'" or (text.isalpha() and not _official_characters(text))


def _official_sentence(
    pieces: Sequence[str], timestamps: Sequence[Sequence[float]] | None
) -> tuple[str, list[list[float]] | None, list[str]]:
    """:func:`sentence_postprocess` with FunASR's habits."""
    given = timestamps is not None
    words, times = _official_words(pieces, timestamps if given else [(0, 0)] * len(pieces))
    words, times = _official_abbreviations(words, times)
    real = [word for word in words if word != " "]
    text = (" " if given else "").join(real if given else words).strip()
    return text, times if given else None, real


def _official_words(
    pieces: Sequence[str], timestamps: Sequence[Sequence[float]]
) -> tuple[list[str], list[list[float]]]:
    """Words, with a space entry after each one of letters, and the times of those that got one."""
    plain = [piece.replace(" ", "") for piece in pieces]
    if plain and all(map(_official_characters, plain)):
        return plain, [list(pair) for pair in timestamps]
    words: list[str] = []
    times: list[list[float]] = []
    if plain and all(map(_official_letters, plain)):
        for piece, (begin, end) in zip(pieces, timestamps, strict=False):
            words += [piece, " "]
            times.append([begin, end])
        return words, times
    unfinished, open_word, spaced = "", False, False
    begin = end = -1.0
    for piece, pair in zip(pieces, timestamps, strict=False):
        if not open_word:
            begin, end = pair
        characters = [c.replace(" ", "") for c in piece]
        if characters and all(map(_official_characters, characters)):
            if spaced:
                words.pop()
            words.append(piece)
            times.append([begin, end])
            open_word = spaced = False
        elif JOINER in piece:
            unfinished += piece.replace(JOINER, "")
            end, open_word, spaced = pair[1], True, False
        elif characters and all(map(_official_letters, characters)):
            words += [unfinished + piece, " "]
            times.append([begin, pair[1]])
            unfinished, open_word, spaced = "", False, True
        else:
            words.append(piece)
    return words, times


def _official_abbreviations(
    words: list[str], times: list[list[float]]
) -> tuple[list[str], list[list[float]]]:
    """Join spaced single letters; the n-th word takes the n-th time, whether it was its own or not."""

    def letter(place: int) -> bool:
        return (
            place < len(words)
            and len(words[place]) == 1
            and words[place].isascii()
            and words[place].isalpha()
        )

    joined: list[str] = []
    spans: list[list[float]] = []
    place = number = 0
    while place < len(words):
        last = place
        while letter(last) and last + 1 < len(words) and words[last + 1] == " " and letter(last + 2):
            last += 2
        text = words[place] if last == place else "".join(words[place : last + 1 : 2]).upper()
        joined.append(text)
        if text != " ":
            final = number + (last - place) // 2
            if final < len(times):
                spans.append([times[number][0], times[final][1]])
            number = final + 1
        place = last + 1
    return joined, spans


LANGUAGE_TAGS = ("zh", "en", "yue", "ja", "ko", "nospeech")
EMOTIONS = {
    "HAPPY": "😊",
    "SAD": "😔",
    "ANGRY": "😡",
    "NEUTRAL": "",
    "FEARFUL": "😰",
    "DISGUSTED": "🤢",
    "SURPRISED": "😮",
}
EVENTS = {
    "BGM": "🎼",
    "Speech": "",
    "Applause": "👏",
    "Laughter": "😀",
    "Cry": "😭",
    "Sneeze": "🤧",
    "Breath": "",
    "Cough": "🤧",
}
OTHER_TAGS = ("EMO_UNKNOWN", "Sing", "Speech_Noise", "withitn", "woitn", "GBG", "Event_UNK")
_KNOWN_TAG = re.compile(r"<\|(" + "|".join((*LANGUAGE_TAGS, *EMOTIONS, *EVENTS, *OTHER_TAGS)) + r")\|>")
_LANGUAGE = re.compile(r"<\|(?:" + "|".join(LANGUAGE_TAGS) + r")\|>")
_EMOTION_SIGNS = tuple(sign for sign in EMOTIONS.values() if sign)
_EVENT_SIGNS = ("🎼", "👏", "😀", "😭", "🤧", "😷")


def split_tags(text: str) -> tuple[str, tuple[str, ...]]:
    """SenseVoice output without its ``<|tags|>``, and the tags' names in order."""
    return _TAG.sub("", text).strip(), tuple(tag[2:-2] for tag in _TAG.findall(text))


def rich_transcription_postprocess(text: str) -> str:
    """SenseVoice's tagged output as readable text: events as signs before, the emotion as a sign after.

    A sign that the next segment would repeat is written once.
    """
    text = text.replace("<|nospeech|><|Event_UNK|>", "❓")
    segments = [_decorate(segment) for segment in _LANGUAGE.split(text)]
    result = segments[0]
    event = None  # the first segment, before any language tag, never passes its event on
    for segment in segments[1:]:
        if segment and segment[0] in _EVENT_SIGNS and segment[0] == event:
            segment = segment[1:]
        if not segment:
            continue
        event = segment[0] if segment[0] in _EVENT_SIGNS else None
        if result and segment[-1] in _EMOTION_SIGNS and segment[-1] == result[-1]:
            result = result[:-1]
        result += segment.strip()
    # SenseVoice tends to write "The." where nothing is said.
    return result.replace("The.", " ").strip()


def _decorate(segment: str) -> str:
    """One language segment with signs for its tags: the most frequent emotion, every event."""
    tags = _KNOWN_TAG.findall(segment)
    text = _KNOWN_TAG.sub("", segment)
    emotion = "NEUTRAL"
    for name in EMOTIONS:
        if tags.count(name) > tags.count(emotion):
            emotion = name
    events = "".join(sign for name, sign in reversed(EVENTS.items()) if name in tags)
    text = events + text + EMOTIONS[emotion]
    for sign in (*_EMOTION_SIGNS, *_EVENT_SIGNS):
        text = text.replace(" " + sign, sign).replace(sign + " ", sign)
    return text.strip()


def _extend(group: PieceGroup, text: str, end: float) -> PieceGroup:
    return PieceGroup(group.text + text, group.begin, end, group.spaced)


def _join_abbreviations(groups: list[PieceGroup]) -> list[PieceGroup]:
    """Turn runs of two or more single ASCII letters into one upper-case word each."""
    result: list[PieceGroup] = []
    run: list[PieceGroup] = []

    def close() -> None:
        if len(run) > 1:
            letters = "".join(group.text for group in run).upper()
            result.append(PieceGroup(letters, run[0].begin, run[-1].end, True))
        else:
            result.extend(run)
        run.clear()

    for group in groups:
        if len(group.text) == 1 and group.text.isascii() and group.text.isalpha():
            run.append(group)
        else:
            close()
            result.append(group)
    close()
    return result
