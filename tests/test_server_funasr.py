"""FunASR's WebSocket protocol, with a client that does what the official ones do."""

import tests.server_extra  # noqa: F401  skips this file where the extra is missing

# isort: split

import asyncio
import io
import json
import threading

import numpy as np
import pytest
import soundfile
from websockets.sync.client import connect

from nar_speech.server import funasr
from nar_speech.server.auth import Limits, read_keys
from nar_speech.server.settings import Settings
from tests.tone_model import ServerThread, pcm, the_end, tone, tone_entry, wait_for

FIRST = {
    "chunk_size": [5, 10, 5],
    "chunk_interval": 10,
    "encoder_chunk_look_back": 4,
    "decoder_chunk_look_back": 0,
    "is_speaking": True,
    "itn": True,
}


@pytest.fixture(scope="module")
def server():
    with ServerThread(Settings(port=0, funasr_port=0), *tone_entry()) as running:
        running.funasr = f"ws://127.0.0.1:{running.server.ports['funasr']}"
        yield running


class OfficialClient:
    """The logic of funasr_wss_client.py: one thread sends, another one builds the text it would print."""

    def __init__(self, address, mode, audio, rate=16000, wav_format="pcm", hotwords="", name="demo", **first):
        self.printed = self.online = self.offline = ""
        self.messages, self.acknowledged = [], threading.Event()
        with connect(address, subprotocols=["binary"], ping_interval=None, max_size=None) as socket:
            assert socket.subprotocol == "binary"
            listener = threading.Thread(target=self.listen, args=(socket,), daemon=True)
            listener.start()
            start = {"mode": mode, "audio_fs": rate, "wav_name": name, "wav_format": wav_format}
            socket.send(json.dumps({**FIRST, **start, "hotwords": hotwords, **first}))
            stride = int(60 * 10 / 10 / 1000 * rate * 2)
            for place in range(0, len(audio), stride):
                socket.send(audio[place : place + stride])
            socket.send(json.dumps({"is_speaking": False, "is_end": True}))
            assert self.acknowledged.wait(60), "server did not acknowledge end of input"
        listener.join(10)

    def listen(self, socket):
        for text in socket:
            message = json.loads(text)
            self.messages.append(message)
            mode, text = message.get("mode", ""), message.get("text", "")
            if mode == "online" or mode == "offline":
                self.printed += text
            elif mode == "2pass-online":
                self.online += text
                self.printed = self.offline + self.online
            elif mode == "2pass-offline":
                self.online = ""
                self.offline += text
                self.printed = self.offline
            if message.get("is_end"):
                self.acknowledged.set()

    @property
    def results(self):
        return [m for m in self.messages if not m.get("is_end")]

    @property
    def end(self):
        return next(m for m in self.messages if m.get("is_end"))


def test_offline(server):
    client = OfficialClient(server.funasr, "offline", pcm(tone("abc")), name="talk")
    (result,) = client.results
    assert client.printed == "Abc."
    assert (result["mode"], result["is_final"], result["wav_name"]) == ("offline", True, "talk")
    assert json.loads(result["timestamp"]) == [[0, 200], [200, 400], [400, 600]]
    (sentence,) = result["stamp_sents"]
    assert sentence == {
        "text_seg": "a b c",
        "punc": ".",
        "start": 0,
        "end": 600,
        "ts_list": [[0, 200], [200, 400], [400, 600]],
    }
    assert client.end == {"mode": "offline", "wav_name": "talk", "text": "", "is_final": True, "is_end": True}


def test_offline_takes_files_of_other_formats(server):
    file = io.BytesIO()
    soundfile.write(file, tone("abc", rate=22050), 22050, format="FLAC")
    client = OfficialClient(server.funasr, "offline", file.getvalue(), wav_format="others")
    assert client.printed == "Abc."


@pytest.mark.parametrize("rate", [16000, 8000])
def test_online(server, rate):
    client = OfficialClient(server.funasr, "online", pcm(tone("abc  d      xyz", rate=rate)), rate)
    assert client.printed == "abcd xyz"  # a long pause ends an utterance
    assert {m["mode"] for m in client.results} == {"online"}
    assert [m["is_final"] for m in client.results] == [False] * (len(client.results) - 1) + [True]
    assert all(m["text"] for m in client.results[:-1])
    assert client.end["is_final"]


def test_two_passes(server):
    client = OfficialClient(server.funasr, "2pass", pcm(tone("abc" + " " * 6 + "xyz")))
    assert client.printed == "Abc. Xyz."
    modes = [m["mode"] for m in client.results]
    assert modes[-1] == "2pass-offline"
    assert "2pass-online" in modes
    finals = [m for m in client.results if m["mode"] == "2pass-offline" and m["text"]]
    assert [m["text"] for m in finals] == ["Abc.", " Xyz."]
    assert [m["is_final"] for m in client.results] == [False] * (len(modes) - 1) + [True]
    assert json.loads(finals[0]["timestamp"])[0] == [0, 200]
    assert client.end["is_final"]


@pytest.mark.parametrize("hotwords", ['{"ada": 20}', "ada lovelace", "ada,lovelace", ""])
@pytest.mark.parametrize("mode", ["2pass", "offline"])
def test_hotwords(server, mode, hotwords):
    assert OfficialClient(server.funasr, mode, pcm(tone("ab")), hotwords=hotwords).printed == "Ab."


def test_hotwords_that_the_model_can_not_spell_are_left_out(server):
    assert OfficialClient(server.funasr, "2pass", pcm(tone("ab")), hotwords="naïve").printed == "Ab."
    assert OfficialClient(server.funasr, "offline", pcm(tone("ab")), hotwords="naïve ada").printed == "Ab."


def test_half_characters(server):
    client = OfficialClient(server.funasr, "2pass", pcm(tone("ab")), name="a\ud800b", hotwords="\udfff ada")
    assert client.printed == "Ab."
    assert {m["wav_name"] for m in client.messages} == {"a?b"}


@pytest.mark.parametrize("rate", [float("inf"), None, 44, "x", [16000]])
def test_rates_that_are_none_are_told(server, rate):
    with connect(server.funasr) as socket:
        socket.send(json.dumps({"audio_fs": rate}))
        assert "audio_fs" in json.loads(socket.recv(60))["error"]
        socket.send(json.dumps({"is_speaking": False}))
        assert json.loads(socket.recv(60))["is_final"]


def test_clients_that_leave_when_all_was_said_are_no_cancelled_ones():
    name = "nar_speech_request_duration_seconds_count"
    ok, cancelled = ({"api": "funasr", "mode": "websocket", "outcome": o} for o in ("ok", "cancelled"))
    with ServerThread(Settings(port=0), *tone_entry()) as running:
        value = running.service.metrics.registry.get_sample_value
        OfficialClient(f"{running.ws}/funasr", "2pass", pcm(tone("ab")))
        wait_for(lambda: value(name, ok) == 1)
        with connect(f"{running.ws}/funasr") as socket:
            socket.send(json.dumps({"mode": "online"}))
            socket.send(pcm(tone("ab")))
        wait_for(lambda: value(name, cancelled) == 1)


@pytest.mark.parametrize("audio", [b"", bytes(3200)])
def test_utterances_that_wait_are_bounded(server, audio, monkeypatch):
    """However many the client sends before the first is recognised, the others stay in the socket."""
    hold, waiting = threading.Event(), []

    async def tell(utterance):
        waiting.append(utterance.talk._utterances.qsize())
        while not hold.is_set():
            await asyncio.sleep(0.01)
        await utterance.talk._say(utterance.config, "offline", "", True)

    for kind in (funasr._File, funasr._Nothing):
        monkeypatch.setattr(kind, "tell", tell)
    count = 10 * funasr.MAX_WAITING
    with connect(server.funasr) as socket:
        socket.send(json.dumps({"mode": "offline"}))
        for _ in range(count):
            socket.send(audio)
            socket.send(json.dumps({"is_speaking": False}))
        threading.Timer(0.5, hold.set).start()
        for _ in range(count):
            assert json.loads(socket.recv(60))["is_final"]
    assert len(waiting) == count
    assert max(waiting) < funasr.MAX_WAITING


def test_an_unknown_mode_is_told_at_the_end(server):
    client = OfficialClient(server.funasr, "fast", pcm(tone("ab")))
    assert client.results == []
    assert (client.end["is_final"], "unknown mode" in client.end["error"]) == (False, True)


def test_a_file_that_is_no_audio(server):
    client = OfficialClient(server.funasr, "offline", b"nothing" * 100, wav_format="mp3")
    assert client.printed == ""
    assert client.end["is_final"] is False
    assert "not audio" in client.end["error"]


def test_no_audio_at_all(server):
    for mode, name in (("2pass", "2pass-offline"), ("online", "online"), ("offline", "offline")):
        client = OfficialClient(server.funasr, mode, b"")
        assert [(m["mode"], m["text"], m["is_final"]) for m in client.results] == [(name, "", True)]
        assert client.end["is_final"]


def hear(socket, final=True):
    """Messages until one with ``is_final``."""
    heard = []
    while not heard or heard[-1]["is_final"] is not final:
        heard.append(json.loads(socket.recv(timeout=60)))
    return heard


def test_the_html_page(server):
    """No subprotocol, no audio_fs, blocks of 960 samples; the end repeats the configuration."""
    start = {"chunk_size": [5, 10, 5], "wav_name": "h5", "is_speaking": True, "chunk_interval": 10}
    with connect(f"{server.funasr}/any/path") as socket:
        assert socket.subprotocol is None
        for text, expected in (("abc", "Abc."), ("xyz", "Xyz.")):  # one recording after the other
            socket.send(json.dumps({**start, "mode": "2pass", "hotwords": '{"Ada": 20}'}))
            data = pcm(tone(text))
            for place in range(0, len(data), 1920):
                socket.send(data[place : place + 1920])
            socket.send(json.dumps({**start, "mode": "2pass", "is_speaking": False}))
            heard = hear(socket)
            assert "".join(m["text"] for m in heard if m["mode"] == "2pass-offline") == expected
            json.loads(heard[-1]["timestamp"])


def test_streams_take_pcm_only(server):
    with connect(server.funasr) as socket:
        socket.send(json.dumps({**FIRST, "mode": "online", "wav_format": "mp3"}))
        for _ in range(3):
            socket.send(b"abcdef")
        (message,) = hear(socket, final=False)
        assert message["text"] == "ERROR. Real-time transcription service ONLY SUPPORT PCM stream."
        socket.send(json.dumps({"is_speaking": False}))
        assert hear(socket)[-1]["text"] == ""


def test_nonsense_is_told_and_the_connection_stays(server):
    with connect(server.funasr) as socket:
        for message in (
            "{",
            "5",
            json.dumps({"audio_fs": 1}),
            json.dumps({"hotwords": " ".join(f"w{i}" for i in range(501))}),
        ):
            socket.send(message)
            assert json.loads(socket.recv(timeout=60))["error"]
        socket.send(json.dumps({**FIRST, "mode": "2pass", "unknown": [1], "chunk_size": "5,10,5"}))
        socket.send(pcm(tone("abc")) + b"\0")
        socket.send(json.dumps({"is_finished": True}))
        assert hear(socket)[-1]["text"] == "Abc."
        assert the_end(socket, *["{"] * 60)[1].code == 1008


def test_the_main_port(server):
    with connect(f"{server.ws}/funasr") as socket:
        socket.send(json.dumps({**FIRST, "mode": "offline"}))
        socket.send(pcm(tone("abc")))
        socket.send(json.dumps({"is_speaking": False}))
        assert hear(socket)[-1]["text"] == "Abc."


def test_without_an_offline_half(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret-key-of-ada")
    settings = Settings(port=0, funasr_port=0, open_ports=True)
    with ServerThread(settings, *tone_entry(second=False), keys=read_keys(keys, Limits(), "")) as running:
        address = f"ws://127.0.0.1:{running.server.ports['funasr']}"  # open: takes clients without a key
        client = OfficialClient(address, "2pass", pcm(tone("abc" + " " * 6 + "xyz")))
        assert client.printed == "abc xyz"
        assert OfficialClient(address, "offline", pcm(tone("abc"))).printed == "abc"
        with connect(f"{running.ws}/funasr") as socket:
            heard, closed = the_end(socket)
            assert closed.code == 1008
            assert "API key" in heard[-1]["error"]
        with connect(f"{running.ws}/funasr?api_key=secret-key-of-ada") as socket:
            socket.send(json.dumps({"mode": "offline"}))
            socket.send(np.zeros(16000, "<i2").tobytes())
            socket.send(json.dumps({"is_speaking": False}))
            assert hear(socket)[-1]["text"] == ""
