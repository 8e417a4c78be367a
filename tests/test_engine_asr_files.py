"""Recordings and live samples through the engine, with a model that hears tones as letters."""

import io
import itertools
import threading

import numpy as np
import pytest
import soundfile
import torch

from nar_speech.engine import Final, Partial
from nar_speech.engine import asr_files as module
from nar_speech.engine.asr_files import Settled, StreamTranscriber
from nar_speech.errors import AudioError, EngineError, NarSpeechError
from nar_speech.types import ModelCard
from tests.tone_model import CHUNK, LETTERS, RATE, ToneBatch, ToneModel, tone

CARD = ModelCard(name="tones", task="transcribe", model="ctc", languages=("en",))


class Fragile(ToneModel):
    """Can't bear a z."""

    def step(self, audio, lengths, final, state):
        output, state = super().step(audio, lengths, final, state)
        tones = audio.square().mean(1) > 0.05  # the noise with which an engine tries batch sizes is softer
        if bool(((output.letter == LETTERS.index("z")) & tones).any()):
            raise RuntimeError("no")
        return output, state


class Second(ToneBatch):
    warm = False

    def warm_up(self):
        self.warm = True


def sound(text):
    return tone(text), RATE


def heard(transcriber, sources, **more):
    return [r.transcript.text if r.error is None else r.error for r in transcriber.results(sources, **more)]


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
def test_results_come_in_order_and_faults_stay_where_they_are(streams):
    transcriber = StreamTranscriber(Fragile(), CARD, max_streams=streams)
    words = ["abc", "de" * 40, "fxz", "", "q", "hijk"]
    sources = [sound(word) for word in words]
    sources[3] = io.BytesIO(b"no audio")
    texts = heard(transcriber, iter(sources))
    assert [texts[i] for i in (0, 1, 4, 5)] == ["abc", "de" * 40, "q", "hijk"]
    assert isinstance(texts[2], NarSpeechError)
    assert str(texts[2]).startswith("audio (tuple): recognition failed: ")
    assert isinstance(texts[3], AudioError)


def test_what_is_read_and_what_happens_is_told():
    seconds, events = [], []
    (result,) = StreamTranscriber(ToneModel(), CARD).results(
        [sound("ab")], seconds.append, lambda name, event: events.append((name, event))
    )
    assert sum(seconds) == pytest.approx(0.4)
    assert {name for name, _ in events} == {"audio (tuple)"}
    assert [event.text for _, event in events if isinstance(event, Partial | Final)] == ["a", "ab", "ab"]
    transcript = result.transcript
    assert (transcript.text, transcript.duration, transcript.language) == ("ab", pytest.approx(0.4), "en")
    (segment,) = transcript.segments
    assert [(word.text, word.start, word.end) for word in segment.words] == [("a", 0.0, 0.2), ("b", 0.2, 0.4)]
    assert segment.confidence == pytest.approx(0.9)


def test_a_file_that_breaks_off_gives_its_error_not_half_a_text(tmp_path, monkeypatch):
    def broken(source, rate, seconds):
        yield tone("abc")
        raise AudioError(f"{source}: damaged at 0.6 s")

    monkeypatch.setattr(module, "read_blocks", broken)
    (result,) = StreamTranscriber(ToneModel(), CARD).results([tmp_path / "a.wav"])
    assert result.transcript is None
    assert str(result.error).endswith("a.wav: damaged at 0.6 s")


def test_silence_has_no_segments_and_long_files_go_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_SECONDS", 0.5)
    soundfile.write(tmp_path / "a.wav", tone("a b c d e "), RATE)
    transcriber = StreamTranscriber(ToneModel(), CARD)
    assert heard(transcriber, [tmp_path / "a.wav", sound("   ")]) == ["abcde", ""]
    (silent,) = transcriber.results([sound("   ")])
    assert silent.transcript.segments == ()


def test_the_text_of_the_second_pass_is_the_one_that_is_told():
    transcriber = StreamTranscriber(ToneModel(), CARD, Second())
    assert heard(transcriber, [sound("abc"), sound("  "), sound("xyz")]) == ["Abc.", "", "Xyz."]


def final(segment, text, source):
    return Final(segment, text, (), (), 0.0, 1.0, source)


def test_finals_are_settled_in_the_order_of_speech():
    settled = Settled(twice=True)
    assert settled.add(final(0, "a", "online")) == []
    assert settled.add(final(1, "", "online")) == []  # nothing to hear again
    assert settled.add(final(2, "c", "online")) == []
    last = final(2, "C", "offline")
    assert settled.add(last) == []
    first = final(0, "A", "offline")
    assert settled.add(first) == [first, final(1, "", "online"), last]
    once = Settled(twice=False)
    assert once.add(final(0, "a", "online")) == [final(0, "a", "online")]


# Live.


def pieces(text, size=CHUNK):
    wave = tone(text)
    return (wave[i : i + size] for i in range(0, len(wave), size))


def test_live_events_come_while_others_speak_and_finals_last():
    second = Second()
    gate = threading.Event()

    def microphone():
        yield from pieces("ab")
        assert gate.wait(60)
        yield from pieces("cd")

    texts = []
    with StreamTranscriber(ToneModel(), CARD, second).listen(microphone()) as listening:
        for event in listening:
            if isinstance(event, Partial | Final):
                texts.append(event.text)
            if texts[-1:] == ["ab"]:
                gate.set()
        assert listening.seconds == pytest.approx(0.8)
        assert [f.text for f in listening.finals] == ["Abcd."]
    assert texts == ["a", "ab", "abc", "abcd", "Abcd."]
    assert second.warm


def test_stop_ends_the_audio_and_keeps_what_was_said():
    more = threading.Event()

    def microphone():
        yield from pieces("ab")
        more.wait(60)
        yield from itertools.cycle([tone("c")])

    texts = []
    with StreamTranscriber(ToneModel(), CARD).listen(microphone()) as listening:
        for event in listening:
            texts.append(event.text)
            if event.text == "ab" and isinstance(event, Partial):
                listening.stop()
    more.set()
    assert texts == ["a", "ab", "ab"]


def test_what_goes_wrong_live_is_raised_after_what_was_said():
    def unplugged():
        yield from pieces("ab")
        raise AudioError("microphone: is gone")

    with (
        StreamTranscriber(ToneModel(), CARD).listen(unplugged()) as listening,
        pytest.raises(AudioError, match="is gone"),
    ):
        list(listening)
    assert [f.text for f in listening.finals] == ["ab"]
    with (
        StreamTranscriber(Fragile(), CARD).listen(pieces("abz")) as listening,
        pytest.raises(EngineError, match="recognition failed"),
    ):
        list(listening)
    assert not any(t.name.startswith("nar-speech-e") for t in threading.enumerate())


def test_many_recordings_share_steps():
    """Company costs little: eight equal files need as many steps as one."""

    class Counting(ToneModel):
        steps = 0

        def step(self, *arguments):
            self.steps += 1
            return super().step(*arguments)

    counts = []
    for number in (1, 8):
        model = Counting()
        transcriber = StreamTranscriber(model, CARD, max_streams=8)
        assert heard(transcriber, [sound("abcdefgh")] * number) == ["abcdefgh"] * number
        counts.append(model.steps)
    assert counts[0] == counts[1]


def test_samples_are_those_of_the_file():
    """Any rate: what the model hears is resampled."""
    wave = torch.from_numpy(tone("abc", rate=48000)).numpy().astype(np.float64)
    assert heard(StreamTranscriber(ToneModel(), CARD), [(wave, 48000)]) == ["abc"]
