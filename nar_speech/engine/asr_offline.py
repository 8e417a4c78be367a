"""The offline half of a model: a :class:`Transcriber` as the engine's batch model."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nar_speech.errors import InputError, NarSpeechError
from nar_speech.model_folder import LONGEST
from nar_speech.pipelines.recognize import make_bias
from nar_speech.pipelines.transcribe import Transcriber


class OfflineModel:
    """Recognises whole segments; a :class:`nar_speech.engine.BatchModel`.

    Waves are not cut here: who submits a long recording cuts it at pauses before, so that it never keeps the
    engine from others.
    """

    def __init__(self, transcriber: Transcriber):
        self.transcriber = transcriber
        self.sample_rate = transcriber.sample_rate
        self.whole = replace(transcriber.decoding.segments, whole=LONGEST)
        self._check = threading.Lock()

    def run(self, waves: list[np.ndarray], options: list[dict[str, Any]]) -> list[Any]:
        """A :class:`nar_speech.types.Transcript` for each wave (N,), or the exception that it caused.

        Args:
            options: of each wave: fields of DecodingConfig as plain data.
        """
        found: list[Any] = [None] * len(waves)
        groups: dict[str, list[int]] = {}
        for index, option in enumerate(options):
            groups.setdefault(json.dumps(option, sort_keys=True), []).append(index)
        for members in groups.values():
            try:
                results = self.transcriber.results(
                    [waves[i] for i in members], **decoding_options(options[members[0]]), segments=self.whole
                )
                for i, result in zip(members, results, strict=True):
                    found[i] = result.transcript if result.error is None else result.error
            except NarSpeechError as error:
                found = [error if i in members else item for i, item in enumerate(found)]
        return found

    def warm_up(self) -> None:
        """Run once, so that everything that is loaded late is there before the first utterance comes.

        Raises:
            NarSpeechError: it can't recognise.
        """
        noise = np.random.default_rng(0).normal(0, 0.01, self.sample_rate).astype(np.float32)
        result = self.run([noise], [{}])[0]
        if isinstance(result, Exception):
            raise result

    def check(self, options: Mapping[str, Any]) -> None:
        """Whether this model takes these options.

        Raises:
            InputError: which it does not, and why.
        """
        with self._check:
            decoding = self.transcriber.decoding_for(decoding_options(options))
            make_bias(decoding.hotwords, self.transcriber.recognizer.tokenizer, decoding.hotword_score)

    def spellable(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """Those words that may be favoured; () where the model favours none."""
        kept = []
        for word in words:
            try:
                self.check({"hotwords": [word]})
            except InputError:
                continue
            kept.append(word)
        return tuple(kept)


def decoding_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data as fields of DecodingConfig."""
    fields = dict(options)
    if "hotwords" in fields:
        fields["hotwords"] = tuple(fields["hotwords"])
    return fields
