"""Golden cases of MaskGCT's text to phones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nar_speech.text.g2p.chinese import Readings, chinese_phones, clean_chinese
from nar_speech.text.g2p.english import english_phones
from nar_speech.text.g2p.english_official import official_english
from nar_speech.text.g2p.scripts import runs, script_of
from nar_speech.text.g2p.vocabulary import PhoneVocabulary
from nar_speech.text.spoken_chinese import official_chinese

if TYPE_CHECKING:
    from tests.golden import Case, Check

# The official polychar.txt: characters whose reading the (supplied) answers give.
POLYPHONES = frozenset(
    "丧中为乌乐了什仔令任会传佛供便倒假兴冠冲几分切划创剥勒区华单卜占卡卷厦参发只号同吐和喝圈地塞壳处奇奔好宁宿将少尽岗差"
    "巷帖干应度弹强当待得恶扁扇扎扫担挑据撒教散数斗晃曝曲更曾朝朴杆查校模横没泡济混漂炸熟燕片率畜的盛相省看着矫禁种称空答"
    "粘糊系累纤结给缝肖背脏舍色落蒙薄藏血行要观觉角解说调踏车转载还遂都重量钻铺长间降难露鲜"
)


def g2p(case: Case) -> Iterator[Check]:
    """Normalised text, words, phones, ids and what is dropped; exact."""
    recorded = json.loads((case.folder / "cases.json").read_text(encoding="utf-8"))
    vocabulary = PhoneVocabulary.maskgct()
    if "vocab_size" in recorded:
        yield case.equal("vocab_size", len(vocabulary), recorded["vocab_size"])
    for number, one in enumerate(recorded.get("en", ())):
        spoken = official_english(one["text"])
        yield case.equal(f"en {number} normalised", spoken, one["normalised"])
        yield from _phones(case, f"en {number}", english_phones(spoken), one, vocabulary)
    for number, one in enumerate(recorded.get("zh", ())):
        text = clean_chinese(official_chinese(one["text"]), official=True)
        yield case.equal(f"zh {number} normalised", text, one["normalised"])
        answers = one["polyphone_answers"]

        def choose(text: str, answers: dict[str, str] = answers) -> dict[int, str]:
            return {at: answers[character] for at, character in enumerate(text) if character in answers}

        phones, words = chinese_phones(text, Readings(one["lexicon"], POLYPHONES, choose), official=True)
        yield case.equal(f"zh {number} words", words, one["words"])
        yield from _phones(case, f"zh {number}", phones, one, vocabulary)
    for number, one in enumerate(recorded.get("mixed", ())):
        yield case.equal(f"mixed {number}", _segments(one["text"]), one["segments"])


def _segments(text: str) -> list[list[str]]:
    """Runs as recorded: a text without letters, which is English for us, is of no language there."""
    if not any(script_of(character) in ("Latin", "Greek", "Han") for character in text):
        return [[text, "other" if text else ""]]
    return [list(run) for run in runs(text)]


def _phones(
    case: Case, name: str, phones: list[str], one: dict, vocabulary: PhoneVocabulary
) -> Iterator[Check]:
    # The official string can begin with a separator, which leaves an empty phone.
    yield case.equal(f"{name} phones", phones, [phone for phone in one["phones"].split("|") if phone])
    dropped = list(vocabulary.unknown(phones))
    yield case.equal(f"{name} dropped", dropped, [phone for phone in one["dropped"] if phone])
    ids = vocabulary.encode(phone for phone in phones if phone in vocabulary)
    yield case.equal(f"{name} ids", ids, one["ids"])


HANDLERS = {"g2p": g2p}
