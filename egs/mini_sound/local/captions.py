"""The closed vocabulary of conf/vocabulary.yaml: captions from labels, and all captions there are.

python captions.py            # prints the vocabulary as JSON: classes, captions, words
"""

import argparse
import itertools
import json
import re
from functools import cache
from pathlib import Path

import yaml

FILE = Path(__file__).resolve().parents[1] / "conf" / "vocabulary.yaml"


@cache
def vocabulary(path: Path = FILE) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def fill(template: str, plural: bool, **words: str) -> str:
    """The template with its words; {a} is the article of the word after it, or nothing before a plural."""
    text = template.format(a="@", **words)
    if plural:
        return text.replace("@ ", "")
    return re.sub(r"@ (?=(\w))", lambda found: "an " if found[1] in "aeiou" else "a ", text)


def music_captions(labels: dict[str, str]) -> list[str]:
    """Captions of rendered music, most exact first; `labels` as in music_labels()."""
    music = vocabulary()["music"]
    words = {key: value for key, value in labels.items() if key != "form"}
    words["tempo"] = music["tempo_words"][labels["tempo"]]
    if "mood" in labels:
        words["mode"] = music["moods"][labels["mood"]]
    plural = music["patterns"].get(labels.get("pattern"), "singular") == "plural"
    return [fill(template, plural, **words) for template in music["captions"][labels["form"]]]


def captions(kind: str, label: str, labels: dict[str, str] | None = None) -> list[str]:
    """All true captions of a clip, most exact first; none for kind "other"."""
    if kind == "other":
        return []
    if kind == "music":
        return music_captions(labels or {})
    entry = vocabulary()[kind][label]
    plain = entry if isinstance(entry, list) else entry["captions"]
    speed = (labels or {}).get("speed")
    exact = [template.format(speed=speed) for template in entry["with_speed"]] if speed else []
    return exact + plain


def music_labels() -> list[dict[str, str]]:
    """Every combination of labels that music is rendered of."""
    music = vocabulary()["music"]
    out = []
    for tempo, mood in itertools.product(music["tempos"], music["moods"]):
        for instrument, patterns in music["instruments"].items():
            for pattern in patterns:
                out.append(
                    {
                        "form": "solo",
                        "instrument": instrument,
                        "pattern": pattern,
                        "tempo": tempo,
                        "mood": mood,
                    }
                )
        out += [{"form": "band", "instrument": lead, "tempo": tempo, "mood": mood} for lead in music["bands"]]
    out += [
        {"form": "drums", "beat": beat, "tempo": tempo}
        for tempo in music["tempos"]
        for beat in music["beats"]
    ]
    return out


def music_class(labels: dict[str, str]) -> str:
    """The class a classifier knows: the instrument, "drums" or "band"."""
    return labels["instrument"] if labels["form"] == "solo" else labels["form"]


def effect_labels() -> list[tuple[str, dict[str, str]]]:
    """(kind of effect, labels) of everything that effects.py makes."""
    out = []
    for name, entry in vocabulary()["effects"].items():
        out += [(name, {"speed": speed}) for speed in entry["speeds"]] if "speeds" in entry else [(name, {})]
    return out


def classes() -> list[str]:
    """The classes of the classifier: ESC-10, effects, instruments, drums, band."""
    known = vocabulary()
    music = [*known["music"]["instruments"], "drums", "band"]
    return [*known["esc10"], *known["effects"], *music]


def all_captions() -> dict[str, list[str]]:
    """Caption -> the classes that it may stand for: one, unless something is wrong."""
    found: dict[str, list[str]] = {}
    known = vocabulary()
    clips = [("esc10", name, {}, name) for name in known["esc10"]]
    clips += [("effects", name, labels, name) for name, labels in effect_labels()]
    clips += [("music", music_class(labels), labels, music_class(labels)) for labels in music_labels()]
    clips += [("samples", name, {}, name) for name in known["samples"]]
    for kind, label, labels, name in clips:
        for caption in captions(kind, label, labels):
            names = found.setdefault(caption, [])
            if name not in names:
                names.append(name)
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    found = all_captions()
    words = sorted({word for caption in found for word in re.findall(r"[a-z]+", caption)})
    print(json.dumps({"classes": classes(), "captions": found, "words": words}, indent=1))


if __name__ == "__main__":
    main()
