"""``nar-speech phonemize``: see what a text becomes before it is spoken."""

from __future__ import annotations

import argparse
import json
import sys

from nar_speech.cli_output import OK
from nar_speech.errors import InputError


def describe_phonemize(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("text", metavar="TEXT", help="what to say; -: standard input")
    parser.add_argument(
        "--language",
        default="auto",
        choices=("auto", "en", "zh", "fr", "de", "ja", "ko", "phones"),
        help="en and zh take the two mixed; phones: TEXT is w|iː|_|d|uː, or ids (default: %(default)s)",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--ids", action="store_true", help="numbers, as models take them")
    output.add_argument("--spoken", action="store_true", help="the words that are read, numbers written out")
    output.add_argument("--json", action="store_true", help="all of it, as JSON")
    parser.add_argument("--official", action="store_true", help="exactly as the official MaskGCT code has it")
    parser.add_argument("--strict", action="store_true", help="phones unknown to the model are an error")
    parser.add_argument("--polyphones", metavar="DIR", help="official model that reads Chinese characters")


def phonemize(options: argparse.Namespace) -> int:
    """Print the phones of one text."""
    from nar_speech.text.g2p import Phonemizer, PhonemizerConfig, PhoneVocabulary

    text = _text(options.text)
    if options.language == "phones":
        vocabulary = PhoneVocabulary.maskgct()
        ids = vocabulary.parse(text)
        phones = "|".join(vocabulary.decode(ids))
        found = {"phones": phones.split("|"), "ids": ids}
        spoken = phones
    else:
        config = PhonemizerConfig(
            options.language,
            "official" if options.official else "spoken",
            "error" if options.strict else "warn",
            options.polyphones,
        )
        read = Phonemizer(config)(text)
        ids, phones, spoken = read.ids, str(read), read.spoken
        found = {
            "spoken": read.spoken,
            "runs": [{"text": part, "language": language} for part, language in read.runs],
            "phones": read.phones,
            "ids": read.ids,
            "dropped": read.dropped,
        }
    if options.json:
        print(json.dumps(found, ensure_ascii=False))
    elif options.spoken:
        print(spoken)
    else:
        print(" ".join(map(str, ids)) if options.ids else phones)
    return OK


def _text(text: str) -> str:
    if text != "-":
        return text
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: is not UTF-8 text ({error.reason})") from error
