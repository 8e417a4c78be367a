"""Many sessions one after the other, bad ones among them; and a restart while people speak."""

import tests.server_extra  # noqa: F401  skips this file where the extra is missing

# isort: split

import asyncio
import contextlib
import gc
import json
import os
import threading
import time

import httpx
import numpy as np
import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from nar_speech.server.bench import resident
from nar_speech.server.settings import Settings
from tests.test_server_funasr import OfficialClient
from tests.test_server_operations import upload
from tests.tone_model import (
    ServerThread,
    binary_frame,
    pcm,
    raw_websocket,
    the_end,
    tone,
    tone_entry,
    wait_for,
)

FINISH = json.dumps({"type": "finish"})
RANDOM = np.random.default_rng(0)


def good(server):
    with connect(f"{server.ws}/v1/stream?endpoint=off") as socket:
        heard, closed = the_end(socket, pcm(tone("abc")), FINISH)
    assert (heard[-2]["text"], closed.code) == ("Abc.", 1000)


def vanishing(server):
    with raw_websocket(server.port, "/v1/stream") as raw:
        raw.sendall(binary_frame(pcm(tone("abc")))[:3333])


def garbage(server):
    with contextlib.suppress(WebSocketException), connect(f"{server.ws}/v1/realtime") as socket:
        for size in (1, 7, 4001):
            socket.send(RANDOM.bytes(size))
            socket.send(RANDOM.bytes(size).hex())


def funasr(server):
    assert OfficialClient(f"{server.ws}/funasr", "2pass", pcm(tone("ab"))).printed == "Ab."


def file(server):
    assert upload(server.url).json()["text"] == "Abc."


def broken_file(server):
    assert upload(server.url, data={"response_format": "tea"}).status_code == 400


KINDS = (good, good, vanishing, garbage, funasr, file, broken_file)


def sessions(server, count):
    for number in range(count):
        KINDS[number % len(KINDS)](server)
    wait_for(lambda: not server.service.at_work and not server.service.peers and not server.engine.sessions)


def open_files():
    return len(os.listdir("/proc/self/fd"))


def tasks(server):
    async def count():
        return len(asyncio.all_tasks())

    return server.call(count())


def soak(first, then):
    """Memory (bytes), open files and tasks after ``first`` sessions, and after ``then`` more."""
    with ServerThread(Settings(port=0), *tone_entry()) as server:
        seen = []
        for count in (first, then):
            sessions(server, count)
            gc.collect()
            time.sleep(0.5)  # what was closed is let go
            seen.append((resident(), open_files(), tasks(server)))
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert "nar_speech_errors_total{" not in httpx.get(f"{server.url}/metrics").text
    return seen


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux tells them")
def test_sessions_leave_nothing_behind():
    before, after = soak(14, 28)
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + 1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux tells them")
def test_a_thousand_sessions_leave_memory_flat():
    before, after = soak(200, 1000)
    assert after[0] < 1.05 * before[0]
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + 1


class Speaker(threading.Thread):
    """Says a letter after the other, and goes on with a new connection when the server restarts."""

    def __init__(self, ports, text):
        super().__init__(daemon=True)
        self.ports, self.text = ports, text
        self.finals, self.closes, self.said = [], [], 0

    def run(self):
        for port in self.ports:
            self.speak(port())
            if self.said == len(self.text):
                return

    def speak(self, port):
        with connect(f"ws://127.0.0.1:{port}/v1/stream?endpoint=off&two_pass=no") as socket:
            listener = threading.Thread(target=self.listen, args=(socket,))
            listener.start()
            with contextlib.suppress(WebSocketException):
                while self.said < len(self.text) and listener.is_alive():
                    socket.send(pcm(tone(self.text[self.said])))
                    self.said += 1
                    time.sleep(0.05)
                socket.send(FINISH)
            listener.join(60)

    def listen(self, socket):
        heard, closed = the_end(socket)
        self.finals += [m["text"] for m in heard if m["type"] == "final"]
        self.closes.append(closed.code)


def test_a_restart_while_people_speak():
    """What was said before the end is told, and a new server takes over."""
    later = {}

    def second():
        wait_for(lambda: later)
        return later["port"]

    letters = "abcdefghijklmnopqrst" * 3
    with ServerThread(Settings(port=0), *tone_entry()) as first:
        speakers = [Speaker((lambda: first.port, second), letters) for _ in range(4)]
        for speaker in speakers:
            speaker.start()
        wait_for(lambda: all(speaker.said >= 5 for speaker in speakers))
        assert first.call(first.server.stop(0.2), 60) is False
        with ServerThread(Settings(port=0), *tone_entry()) as other:
            later["port"] = other.port
            for speaker in speakers:
                speaker.join(60)
    for speaker in speakers:
        assert speaker.closes == [1012, 1000]
        assert len(speaker.finals) == 2
        told = "".join(speaker.finals)
        assert letters.startswith(speaker.finals[0])
        assert letters.endswith(speaker.finals[1])
        assert len(told) >= len(letters) - 10  # what was on its way when the connection closed
