"""Names that are kept for evaluation and must never be trained on, and the hard check that refuses them.

The list follows the reservations of the corpora that this recipe uses. `check_not_reserved` is called on
every training manifest; it looks at the record's source, speaker and file name.
"""

import re
from collections.abc import Iterable, Mapping

SPEECHOCEAN_TEST = frozenset(
    [
        "6067",
        "6099",
        "6902",
        "8063",
        "8068",
        "8153",
        "8581",
        "8584",
        "9088",
        "9101",
        "9107",
        "9118",
        "9553",
        "9555",
        "9558",
        "9601",
        "9608",
        "9610",
        "9612",
        "9617",
        "9618",
        "9622",
        "9623",
        "9626",
        "9629",
        "9631",
        "9633",
        "9635",
        "9640",
        "9647",
    ]
)
ASTERISK_WORDS = frozenset({"with", "you-entered", "your"})
VCTK_SPEAKERS = frozenset({"p225", "p226", "p227", "p228"})
# Speakers of LibriSpeech test-other that the Resemblyzer repository carries.
LIBRISPEECH_TEST = frozenset(["1688", "1998", "2033", "2414", "2609", "3005", "3080", "3331", "3528", "3538"])
SINGLES = ("jfk", "harvard", "ldc93s1", "61-70968", "whatstheweatherlike", "common_voice")
# Cut names of the evaluation sets that prepare_eval.py writes.
EVAL_SOURCES = frozenset(
    {"asterisk_reserved", "pocketsphinx", "fsdd_test", "librispeech_other", "vctk", "jfk"}
)


class ReservedDataError(ValueError):
    """A training list names a recording that is reserved for evaluation."""


def asterisk_reserved(name: str) -> bool:
    """True for the English Asterisk prompts kept for evaluation (`name` without folder and extension)."""
    return name.startswith("vm-") or name in ASTERISK_WORDS


def reason_reserved(source: str, name: str, speaker: str | None = None) -> str | None:
    """Why the recording `name` (file name without folder and extension) of `source` is reserved, or None."""
    low = name.lower()
    if source in EVAL_SOURCES:
        return f"{source} is an evaluation set"
    if source == "asterisk" and asterisk_reserved(name):
        return "Asterisk prompts vm-*, with, you-entered and your are reserved"
    if source == "fsdd" and re.fullmatch(r"\d_[a-z]+_[0-4]", low):
        return "takes 0 to 4 of the spoken digits are reserved"
    if source == "speechocean762":
        number = re.sub(r"\D", "", speaker or "")[-4:] or name[1:5]
        if number in SPEECHOCEAN_TEST or name[1:5] in SPEECHOCEAN_TEST:
            return f"speechocean762 speaker {number} is in the reserved part of the test list"
    if source == "dctts_reader":
        match = re.match(r"LJ003-(\d{4})", name)
        if match and 59 <= int(match[1]) <= 98:
            return "dc_tts recordings LJ003-0059 to LJ003-0098 are reserved"
    if re.match(r"p22[5-8]_", low) or speaker in VCTK_SPEAKERS:
        return "VCTK speakers p225 to p228 are reserved"
    libri = re.fullmatch(r"(\d+)-\d+-\d{4}", name)
    if libri and libri[1] in LIBRISPEECH_TEST:
        return f"LibriSpeech speaker {libri[1]} belongs to test-other"
    if any(low.startswith(single) for single in SINGLES):
        return "a single clip kept for evaluation"
    return None


def check_not_reserved(records: Iterable[Mapping], where: str) -> int:
    """Raise ReservedDataError if any record is reserved; returns how many were looked at.

    Each record needs `source` and `name`, and may have `speaker`.
    """
    count = 0
    for record in records:
        why = reason_reserved(record["source"], record["name"], record.get("speaker"))
        if why:
            raise ReservedDataError(
                f"{where}: {record['source']}/{record['name']}: {why}; take it out of training"
            )
        count += 1
    return count
