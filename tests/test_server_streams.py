"""Plain PCM over a WebSocket, Wyoming, and clients that behave badly on either."""

import tests.server_extra  # noqa: F401  skips this file where the extra is missing

# isort: split

import asyncio
import contextlib
import json
import socket
import struct

import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from nar_speech.server import service
from nar_speech.server.settings import Settings
from tests.tone_model import (
    CHUNK,
    RATE,
    ServerThread,
    ToneModel,
    binary_frame,
    pcm,
    raw_websocket,
    the_end,
    tone,
    tone_entry,
    wait_for,
)

wyoming = pytest.importorskip("wyoming")


class FragileModel(ToneModel):
    """Fails on a stream that is loud, as a broken one would."""

    def step(self, audio, lengths, final, state):
        if bool((audio.abs() > 0.9).any()):
            raise ZeroDivisionError("poison")
        return super().step(audio, lengths, final, state)


@pytest.fixture(scope="module")
def server():
    entries, models = tone_entry()
    models["tones:online"] = FragileModel()
    settings = Settings(port=0, wyoming_port=0, max_streams=4, max_message_bytes=1 << 20)
    with ServerThread(settings, entries, models) as running:
        yield running


@pytest.fixture(autouse=True)
def all_places_are_free(server):
    """A client that has left gives its place back a moment later; the next test must not meet it."""
    wait_for(lambda: not server.service.streams and not server.engine.sessions)


def stream(server, query="?endpoint=0.3", **more):
    return connect(f"{server.ws}/v1/stream{query}", **more)


FINISH = json.dumps({"type": "finish"})


def test_a_whole_stream(server):
    data = pcm(tone("abc" + " " * 5 + "xyz"))
    with stream(server) as socket_:
        heard, closed = the_end(socket_, *[data[i : i + 999] for i in range(0, len(data), 999)], FINISH)
    assert closed.code == 1000
    assert heard[0] == {"type": "ready", "model": "tones", "rate": 16000}
    assert heard[-1] == {"type": "closed", "reason": "finished"}
    finals = [m for m in heard if m["type"] == "final" and m["text"]]
    assert [(m["source"], m["text"]) for m in finals if m["segment"] == 0] == [
        ("online", "abc"),
        ("offline", "Abc."),
    ]
    assert {m["text"] for m in finals} == {"abc", "Abc.", "xyz", "Xyz."}
    kinds = [m["type"] for m in heard]
    assert kinds.index("speech_started") < kinds.index("partial") < kinds.index("speech_stopped")
    partials = [m for m in heard if m["type"] == "partial" and m["segment"] == 0]
    assert all("abc".startswith(m["text"][: m["stable"]]) for m in partials)
    word = next(m for m in finals if m["segment"] == 0)["words"][1]
    assert (word["word"], word["start"], word["end"]) == ("b", 0.2, 0.4)


@pytest.mark.parametrize(
    ("query", "convert"),
    [
        ("rate=48000&encoding=f32le", lambda x: x.astype("<f4").tobytes()),
        ("rate=24000&encoding=s32le", lambda x: (x * 2**31 * 0.99).astype("<i4").tobytes()),
        ("rate=44100&channels=2", lambda x: pcm(np.repeat(x, 2))),
    ],
)
def test_encodings(server, query, convert):
    rate = int(query[5:10])
    with stream(server, f"?{query}&two_pass=false&endpoint=off&hotwords=ada,bob&language=en-US") as socket_:
        heard, _ = the_end(socket_, convert(tone("abc xyz", rate=rate)), FINISH)
    assert [m["text"] for m in heard if m["type"] == "final"] == ["abcxyz"]


def test_commit_and_ping(server):
    with stream(server, "?endpoint=off&two_pass=no") as socket_:
        commit, ping = json.dumps({"type": "commit"}), json.dumps({"type": "ping"})
        heard, _ = the_end(socket_, pcm(tone("abc")), commit, ping, pcm(tone("xyz")), FINISH)
    assert [m["text"] for m in heard if m["type"] == "final"] == ["abc", "xyz"]
    assert "pong" in [m["type"] for m in heard]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?rate=12345", "rate"),
        ("?rate=fast", "rate"),
        ("?encoding=opus", "encoding"),
        ("?channels=99", "channels"),
        ("?endpoint=never", "endpoint"),
        ("?endpoint=-1", "endpoint"),
        ("?language=xx", "language"),
        ("?model=gpt-9", "model"),
        ("?hotwords=naïve", "hotwords"),
    ],
)
def test_addresses_that_are_wrong(server, query, param):
    with stream(server, query) as socket_:
        heard, closed = the_end(socket_)
    assert (heard[-1]["error"]["param"], closed.code) == (param, 1008)


def test_nonsense(server):
    with stream(server) as socket_:
        heard, closed = the_end(socket_, "{", json.dumps({"type": "dance"}), *["[]"] * 60)
        assert closed.code == 1008
        assert heard[-1]["error"]["code"] == "too_many_errors"
    with stream(server, "?encoding=f32le") as socket_:
        heard, _ = the_end(socket_, struct.pack("<4f", 0, np.nan, 0, 0), FINISH)
        assert "f32le" in next(m for m in heard if m["type"] == "error")["error"]["message"]
    with stream(server) as socket_:
        closed = the_end(socket_, b"\0" * (2 << 20))[1]
        assert closed is None or closed.code == 1009  # TCP's reset may overtake the close frame


def test_a_bad_stream_fails_alone(server):
    with stream(server, "?endpoint=off&two_pass=no") as good, stream(server) as bad:
        good.send(pcm(tone("abc")))
        heard, closed = the_end(bad, np.full(CHUNK, 32767, "<i2").tobytes(), FINISH)
        assert [m["type"] for m in heard][1:] == ["error", "closed"]
        assert heard[1]["error"]["code"] == "recognition_failed"
        assert closed.code in (1000, 1008)
        heard, _ = the_end(good, pcm(tone("xyz")), FINISH)
        assert [m["text"] for m in heard if m["type"] == "final"] == ["abcxyz"]


def test_idle_streams_are_closed():
    settings = Settings(port=0, idle_seconds=1.0)
    with ServerThread(settings, *tone_entry()) as running, stream(running) as socket_:
        heard, closed = the_end(socket_, pcm(tone("abc")))
    assert (closed.code, heard[-1]["error"]["code"]) == (1001, "session_idle")
    assert [m["text"] for m in heard if m["type"] == "final" and m["source"] == "offline"] == ["Abc."]


def test_a_stream_that_is_too_long_is_told_what_was_heard():
    settings = Settings(port=0, max_stream_seconds=1.0)
    with ServerThread(settings, *tone_entry()) as running, stream(running) as socket_:
        heard, closed = the_end(socket_, pcm(tone("abcdefgh")))
    assert [m["text"] for m in heard if m["type"] == "final"] == ["abcde", "Abcde."]
    assert (closed.code, heard[-1]["error"]["code"]) == (1009, "stream_too_long")


@pytest.mark.parametrize("path", ["funasr", "v1/realtime?intent=transcription"])
def test_a_client_that_says_nothing_is_told_why_it_has_to_go(path, monkeypatch):
    monkeypatch.setattr(service, "IDLE_GRACE", 0.1)
    settings = Settings(port=0, idle_seconds=0.2)
    with ServerThread(settings, *tone_entry()) as running, connect(f"{running.ws}/{path}") as socket_:
        heard, closed = the_end(socket_)
        assert "no audio came" in json.dumps(heard[-1])
        assert closed.code == 1001
        wait_for(lambda: not running.service.peers)


def test_no_more_streams_than_there_are_places(server):
    wait_for(lambda: not server.service.streams)
    with contextlib.ExitStack() as held:
        for _ in range(4):
            held.enter_context(stream(server)).recv(timeout=60)
        with stream(server) as fifth:
            heard, closed = the_end(fifth)
    assert (heard[-1]["error"]["code"], closed.code) == ("overloaded", 1013)
    wait_for(lambda: not server.service.streams)
    with stream(server) as again:
        assert json.loads(again.recv(timeout=60))["type"] == "ready"


def test_clients_that_vanish_leave_nothing_behind(server):
    for _ in range(5):
        raw = raw_websocket(server.port, "/v1/stream")
        raw.sendall(binary_frame(pcm(tone("abc")))[:9999])
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()  # with a reset, in the middle of a message
    wait_for(lambda: not server.service.streams and not server.service.peers and not server.engine.sessions)

    def all_places_can_be_taken():
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(stream(server)) for _ in range(4)]
            return all(json.loads(other.recv(timeout=60))["type"] == "ready" for other in others)

    wait_for(all_places_can_be_taken)  # at once or, if the server has yet to meet the vanished, later


def test_a_client_that_sends_faster_than_real_time_is_slowed_down_not_refused(server):
    with stream(server, "?endpoint=off&two_pass=no") as socket_:
        text = "abcdefghij" * 30
        data = pcm(tone(text))  # a minute
        heard, closed = the_end(
            socket_, *[data[i : i + 200_000] for i in range(0, len(data), 200_000)], FINISH
        )
    assert closed.code == 1000
    assert "".join(m["text"] for m in heard if m["type"] == "final") == text


class ChattyModel(ToneModel):
    """Says much: a long text for each chunk."""

    def collector(self, options):
        from nar_speech.engine import Final

        class Chatty:
            segment = 0

            def push(self, row, samples, final):
                self.segment += 1
                return [Final(self.segment, "x" * 20_000, (), (), 0.0, samples / RATE)]

            def export(self):
                return {}

            def restore(self, data):
                pass

        return Chatty()


def test_a_client_that_does_not_read_is_cut_off():
    entries, models = tone_entry(second=False)
    models["tones:online"] = ChattyModel()
    settings = Settings(port=0, stall_seconds=1.0)
    with ServerThread(settings, entries, models) as running:
        raw = raw_websocket(running.port, "/v1/stream")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        frame = binary_frame(bytes(2 * CHUNK))
        wait_for(lambda: running.service.peers)
        raw.settimeout(1.0)
        with contextlib.suppress(OSError):  # the server stops to read, or is gone
            for _ in range(3000):
                raw.sendall(frame)
        wait_for(lambda: not running.service.peers and not running.service.streams)
        text = httpx.get(f"{running.url}/metrics").text
        assert 'slow_readers_total{api="stream"} 1.0' in text
        assert 'request_duration_seconds_count{api="stream",mode="websocket",outcome="cut"} 1.0' in text
        raw.close()


def ask_wyoming(server, *events, until="transcript"):
    """Send events with the official client; what comes back up to a type."""
    from wyoming.client import AsyncTcpClient

    async def main():
        heard = []
        async with AsyncTcpClient("127.0.0.1", server.server.ports["wyoming"], read_timeout=60) as client:
            for event in events:
                await client.write_event(event.event())
            while not heard or heard[-1].type != until:
                event = await client.read_event()
                if event is None:
                    break
                heard.append(event)
        return heard

    return asyncio.run(main())


def speak_wyoming(samples, rate=16000, width=2, channels=1, language="en"):
    from wyoming.asr import Transcribe
    from wyoming.audio import AudioChunk, AudioStart, AudioStop

    scale = {1: lambda x: (x * 127 + 128).astype(np.uint8), 2: lambda x: (x * 32767).astype("<i2")}
    data = scale[width](np.repeat(samples, channels)).tobytes()
    form = {"rate": rate, "width": width, "channels": channels}
    yield Transcribe(language=language)
    yield AudioStart(**form)
    for place in range(0, len(data), 2048):
        yield AudioChunk(audio=data[place : place + 2048], **form)
    yield AudioStop()


def test_wyoming_describes_itself(server):
    from wyoming.info import Describe, Info
    from wyoming.ping import Ping

    (event,) = ask_wyoming(server, Describe(), until="info")
    (program,) = Info.from_event(event).asr
    assert (program.name, program.supports_transcript_streaming) == ("nar_speech", True)
    assert [(m.name, m.languages) for m in program.models] == [("tones", ["en"])]
    (event,) = ask_wyoming(server, Ping("hello"), until="pong")
    assert event.data["text"] == "hello"


@pytest.mark.parametrize(("rate", "width", "channels"), [(16000, 2, 1), (22050, 2, 2), (8000, 1, 1)])
def test_wyoming_transcribes(server, rate, width, channels):
    events = speak_wyoming(tone("abc    xyz", rate=rate), rate, width, channels, language="de")
    heard = ask_wyoming(server, *events, until="transcript-stop")
    assert [heard[0].type, heard[-2].type, heard[-1].type] == [
        "transcript-start",
        "transcript",
        "transcript-stop",
    ]
    assert heard[-2].data["text"] == "Abcxyz."
    chunks = [e.data["text"] for e in heard if e.type == "transcript-chunk"]
    assert "".join(chunks) == "abcxyz"


def test_wyoming_without_a_streaming_half():
    entries, models = tone_entry()
    from dataclasses import replace

    entries = [replace(entries[0], stream_key=None)]
    del models["tones:online"]
    with ServerThread(Settings(port=0, wyoming_port=0), entries, models) as running:
        (event,) = ask_wyoming(running, *speak_wyoming(tone("abc")))
        assert event.data["text"] == "Abc."
        with stream(running) as socket_:
            heard, _ = the_end(socket_)
        assert heard[-1]["error"]["code"] == "not_streaming"


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\n",
        b"[]\n",
        b'{"type": 5}\n',
        b'{"type": "audio-chunk", "payload_length": 99999999999}\n',
        b'{"type": "audio-chunk", "payload_length": -1}\n',
        b'{"type": "audio-chunk", "payload_length": "x"}\n',
        b'{"type": "audio-chunk", "data_length": 3}\nabc',
        b'{"type": "audio-start", "data": {"rate": 1}}\n',
        b'{"type": "audio-start", "data": {"rate": "x", "width": 9}}\n',
        b"x" * 100_000,
        b'{"type": "transcribe", "data": {"name": "gpt-9"}}\n{"type": "audio-start"}\n',
        b'{"type": "transcribe", "data": {"name": "\\ud800"}}\n{"type": "audio-start"}\n',
        b'{"type": "audio-start", "data": {"width": []}}\n',
        b'{"type": "audio-start", "data": {"width": true}}\n',
    ],
)
def test_wyoming_nonsense(server, data):
    with socket.create_connection(("127.0.0.1", server.server.ports["wyoming"]), timeout=60) as raw:
        raw.sendall(data)
        answer = json.loads(raw.makefile("rb").readline())
        assert answer["type"] == "error"
    wait_for(lambda: not server.service.peers and not server.service.streams)


def test_wyoming_is_told_once_of_audio_that_is_refused_and_words_may_be_anything(server):
    address = ("127.0.0.1", server.server.ports["wyoming"])
    with socket.create_connection(address, timeout=60) as raw, raw.makefile("rb") as lines:
        raw.sendall(b'{"type": "audio-start", "data": {"rate": 1}}\n' + b'{"type": "audio-chunk"}\n' * 9)
        raw.sendall(b'{"type": "ping", "data": {"text": "\\ud800"}}\n')
        heard = []
        while not heard or heard[-1]["type"] != "pong":
            heard.append(json.loads(lines.readline()))
            heard[-1]["data"] = json.loads(lines.read(heard[-1]["data_length"]))
        assert [event["type"] for event in heard] == ["error", "pong"]
        assert heard[-1]["data"] == {"text": "?"}
        raw.sendall(b'{"type": "transcribe", "data": {"transcript_terms": 5, "transcript_names": [1]}}\n')
        raw.sendall(b'{"type": "audio-start"}\n{"type": "audio-stop"}\n')
        assert json.loads(lines.readline())["type"] == "transcript"
    wait_for(lambda: not server.service.peers)


def test_wyoming_refuses_audio_in_pieces_that_do_not_come(server):
    with socket.create_connection(("127.0.0.1", server.server.ports["wyoming"]), timeout=60) as raw:
        raw.sendall(b'{"type": "audio-chunk", "payload_length": 100}\nabc')
        raw.shutdown(socket.SHUT_WR)
        assert raw.makefile("rb").read() == b""  # no answer to half a message, only the end
    wait_for(lambda: not server.service.peers)
