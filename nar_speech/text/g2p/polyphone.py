"""Which reading a Chinese character of several has in its sentence: the official model, when it is there.

The folder is ``models/tts/maskgct/g2p/sources/g2p_chinese_model`` of the official code, with
``poly_bert_model.onnx``, ``vocab.txt``, ``polychar.txt`` (the characters it knows) and ``polydict.json``
(what its classes mean).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from nar_speech.errors import ConfigError, MissingExtraError

_LONGEST = 256  # characters the network sees at once
_PIECE = re.compile(rf"[^.?!…;]{{1,{_LONGEST - 1}}}[.?!…;]?|[.?!…;]+")


class PolyphoneModel:
    """The ONNX network and its tables.

    Args:
        folder: where the four files lie.

    Raises:
        ConfigError: a file is missing or damaged.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            self.characters = frozenset((folder / "polychar.txt").read_text(encoding="utf-8").split())
            symbols = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
            classes = json.loads((folder / "polydict.json").read_text(encoding="utf-8"))
            network = (folder / "poly_bert_model.onnx").read_bytes()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder}: not the folder of a polyphone model ({error})") from error
        self._symbols = {symbol.rstrip("\r"): number for number, symbol in enumerate(symbols)}
        self._readings = _readings(classes, self.characters, folder)
        missing = {"[CLS]", "[UNK]"} - set(self._symbols)
        if missing:
            raise ConfigError(f"{folder}/vocab.txt: has no {' and no '.join(sorted(missing))}")
        self._session = _open(network, folder)

    def readings(self, text: str) -> dict[int, str]:
        """Pinyin with its tone (``chang2``) at every place of a character the model knows.

        The network runs once for every piece of a text (a sentence, or 256 characters), whatever their number
        of such characters. Only a character's own readings are weighed against each other.
        """
        import numpy

        found: dict[int, str] = {}
        for piece in _PIECE.finditer(text):
            places = [at for at, character in enumerate(piece[0]) if character in self._readings]
            if not places:
                continue
            unknown = self._symbols["[UNK]"]
            ids = [self._symbols["[CLS]"], *(self._symbols.get(one, unknown) for one in piece[0])]
            scores = self._session.run(["outputs"], {"input_ids": numpy.asarray([ids], dtype=numpy.int32)})
            for at in places:
                own = self._readings[piece[0][at]]
                found[piece.start() + at] = max(own, key=lambda one: scores[0][0, at, own[one]])
        return found


def _readings(classes: object, characters: frozenset[str], folder: Path) -> dict[str, dict[str, int]]:
    """Character -> reading -> class; ``classes`` has ``"1": "丧{sang1}"``, counted from 1."""
    readings: dict[str, dict[str, int]] = {}
    for number, name in classes.items() if isinstance(classes, dict) else ():
        if not (found := re.fullmatch(r"(.)\{([a-z]+[1-5])\}", str(name))) or not number.isdigit():
            raise ConfigError(
                f"{folder}/polydict.json: '{number}': '{name}' is not such as '1': '丧{{sang1}}'"
            )
        if found[1] in characters:
            readings.setdefault(found[1], {})[found[2]] = int(number) - 1
    if not readings:
        raise ConfigError(f"{folder}/polydict.json: has no reading of the characters in polychar.txt")
    return readings


def _open(network: bytes, folder: Path):
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "tts-zh", "the polyphone model") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a small network on short pieces
    try:
        return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no public base
        first = str(error).split("\n")[0]
        raise ConfigError(f"{folder}/poly_bert_model.onnx: can't be loaded ({first})") from error
