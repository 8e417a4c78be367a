"""Running a server: health, metrics, logs, draining, signals, TLS, the command line, the load tool."""

import tests.server_extra  # noqa: F401  skips this file where the extra is missing

# isort: split

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import soundfile
from websockets.asyncio.client import connect as asyncio_connect
from websockets.sync.client import connect

from nar_speech import cli
from nar_speech.errors import ConfigError, InputError
from nar_speech.server import bench, command
from nar_speech.server.bench_socket import Scrape, Target, bench_server
from nar_speech.server.logs import JsonLines
from nar_speech.server.run import check_security
from nar_speech.server.settings import ModelSpec, Settings
from tests.tone_model import RATE, ServerThread, ToneModel, pcm, the_end, tone, tone_entry, wait_for

ROOT = Path(__file__).parent.parent
FINISH = json.dumps({"type": "finish"})


@pytest.fixture
def logs():
    """Log lines of the server, as JSON."""
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(json.loads(JsonLines().format(record)))

    root, handler = logging.getLogger(), Keep()
    root.addHandler(handler)
    logging.getLogger("nar_speech").setLevel(logging.INFO)
    yield lines
    root.removeHandler(handler)
    logging.getLogger("nar_speech").setLevel(logging.NOTSET)


def upload(url, text="abc", **more):
    file = io.BytesIO()
    soundfile.write(file, tone(text), RATE, format="WAV")
    files = {"file": ("secret-name.wav", file.getvalue())}
    return httpx.post(f"{url}/v1/audio/transcriptions", files=files, timeout=60, **more)


def test_health_metrics_and_logs(logs):
    with ServerThread(Settings(port=0), *tone_entry()) as running:
        with connect(f"{running.ws}/v1/stream?api_key=secret-in-the-address") as socket:
            the_end(socket, pcm(tone("abc")), FINISH)
        assert upload(running.url).json()["text"] == "Abc."
        assert upload(running.url, data={"model": "none"}).status_code == 404
        assert httpx.get(f"{running.url}/healthz").json() == {"status": "ok", "reason": ""}
        ready = httpx.get(f"{running.url}/readyz").json()
        assert (ready["status"], ready["streams"]) == ("ready", 0)
        assert ready["heartbeat_age"] < 5
        seen = Scrape.parse(httpx.get(f"{running.url}/metrics").text)
    assert seen.values["nar_speech_connections_total", 'api="stream"'] == 1
    assert seen.values["nar_speech_connections_active", 'api="stream"'] == 0
    assert seen.values["nar_speech_audio_seconds_total", 'api="stream"'] == pytest.approx(0.6)
    assert seen.values["nar_speech_audio_seconds_total", 'api="openai_http"'] == pytest.approx(0.6)
    assert seen.values["nar_speech_requests_rejected_total", 'api="openai_http",status="404"'] == 1
    assert seen.values["nar_speech_engine_sessions_opened_total", 'model="tones:online"'] == 1
    closed = 'model="tones:online",reason="finished"'
    assert seen.values["nar_speech_engine_sessions_closed_total", closed] == 1
    assert seen.total("engine_chunks_total") == 7  # six, and the end
    assert seen.total("engine_batch_size_count") == seen.total("engine_steps_total")
    assert seen.total("engine_jobs_done_total") == 2  # the upload and the second pass
    assert seen.total("time_to_first_partial_seconds_count") == 1
    assert seen.buckets("engine_latency_seconds")[float("inf")] == 7
    requests = [line for line in logs if line["event"] == "request"]
    assert {(r["api"], r["outcome"]) for r in requests} == {
        ("stream", "ok"),
        ("openai_http", "ok"),
        ("openai_http", "refused"),
    }
    assert all(r["key"] == "anonymous" and r["seconds"] >= 0 for r in requests)
    everything = json.dumps(logs)
    for private in ("Abc.", "abc", "secret"):
        assert private not in everything


def test_text_is_logged_when_asked_for(logs):
    """Of every protocol."""
    sound, end = pcm(tone("abc")), json.dumps({"is_speaking": False})
    with ServerThread(Settings(port=0, wyoming_port=0, log_text=True), *tone_entry()) as running:
        upload(running.url)
        with connect(f"{running.ws}/v1/stream") as socket_:
            the_end(socket_, sound, FINISH)
        for mode in ("2pass", "offline"):
            with connect(f"{running.ws}/funasr") as socket_:
                for message in (json.dumps({"mode": mode}), sound, end):
                    socket_.send(message)
                while not json.loads(socket_.recv(timeout=60))["is_final"]:
                    pass
        address = ("127.0.0.1", running.server.ports["wyoming"])
        with socket.create_connection(address, timeout=60) as raw, raw.makefile("rb") as lines:
            raw.sendall(b'{"type": "audio-chunk", "payload_length": %d}\n' % len(sound) + sound)
            raw.sendall(b'{"type": "audio-stop"}\n')
            while (head := json.loads(lines.readline()))["type"] != "transcript-stop":
                lines.read(head["data_length"])
        wait_for(lambda: not running.service.peers)
    texts = {(line["api"], line["mode"]): line["text"] for line in logs if "text" in line}
    kinds = ("openai_http", "transcription"), ("stream", "websocket"), ("funasr", "2pass")
    kinds += ("funasr", "offline"), ("wyoming", "connection")
    assert texts == dict.fromkeys(kinds, "Abc.")


def test_a_dead_engine_is_seen(logs):
    with ServerThread(Settings(port=0), *tone_entry()) as running:
        running.engine.close()
        assert httpx.get(f"{running.url}/healthz").status_code == 503
        answer = httpx.get(f"{running.url}/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "closed")
        assert upload(running.url).json()["error"]["code"] == "engine_stopped"
        with connect(f"{running.ws}/v1/stream") as socket:
            heard, closed = the_end(socket)
        assert (heard[-1]["error"]["code"], closed.code) == ("engine_stopped", 1013)


def test_draining_lets_streams_finish_and_refuses_others():
    settings = Settings(port=0, funasr_port=0, wyoming_port=0)
    with ServerThread(settings, *tone_entry()) as running, contextlib.ExitStack() as stack:
        early, late = (stack.enter_context(connect(f"{running.ws}/v1/stream?endpoint=off")) for _ in "12")
        for socket in (early, late):
            socket.recv(timeout=60)
            socket.send(pcm(tone("abc")))
        streams = running.service.streams
        wait_for(lambda: len(streams) == 2 and all(s.samples for s in list(streams)))
        stopped = []
        thread = threading.Thread(target=lambda: stopped.append(running.call(running.server.stop(3.0), 60)))
        thread.start()
        wait_for(lambda: running.service.draining)
        answer = httpx.get(f"{running.url}/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
        assert httpx.get(f"{running.url}/healthz").status_code == 200
        refused = upload(running.url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"]
        with connect(f"{running.ws}/v1/stream") as socket:
            heard, closed = the_end(socket)
        assert (heard[-1]["error"]["code"], closed.code) == ("draining", 1013)
        heard, closed = the_end(early, pcm(tone("xyz")), FINISH)  # ends by itself
        assert (closed.code, heard[-2]["text"]) == (1000, "Abcxyz.")
        heard, closed = the_end(late)  # is ended, with all it has said
        assert closed.code == 1012
        assert [m["text"] for m in heard if m["type"] == "final"] == ["abc", "Abc."]
        thread.join(60)
        assert stopped == [False]
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.url)


@pytest.mark.parametrize("second", [True, False])
def test_the_last_text_of_a_slow_model_is_waited_for(second, logs):
    entries, models = tone_entry(second)
    model = models["tones:online"]
    step = model.step
    with ServerThread(Settings(port=0), entries, models) as running:
        model.step = lambda *inputs: (time.sleep(0.3), step(*inputs))[1]
        with connect(f"{running.ws}/v1/stream?endpoint=off") as socket:
            socket.recv(timeout=60)
            socket.send(pcm(tone("abc")))
            wait_for(lambda: any(s.samples for s in list(running.service.streams)))
            stop = threading.Thread(target=lambda: running.call(running.server.stop(0.0), 60))
            stop.start()
            heard, closed = the_end(socket)
        stop.join(60)
    texts = [m["text"] for m in heard if m["type"] == "final"]
    assert texts == (["abc", "Abc."] if second else ["abc"])
    assert (closed.code, closed.reason) == (1012, "the server restarts")
    (outcome,) = (line["outcome"] for line in logs if line["event"] == "request")
    assert outcome == "drained"


def test_an_idle_server_stops_at_once():
    with ServerThread(Settings(port=0), *tone_entry()) as running:
        begun = time.monotonic()
        assert running.call(running.server.stop(30.0), 60)
        assert time.monotonic() - begun < 20


SCRIPT = """
from nar_speech.engine import Engine
from nar_speech.server.auth import Keyring
from nar_speech.server.logs import set_up
from nar_speech.server.run import run_loop, serve_until_signal
from nar_speech.server.service import Catalog, Service
from nar_speech.server.settings import Settings
from tests.tone_model import tone_entry
set_up("json", "info")
entries, models = tone_entry()
with Engine(models) as engine:
    async def main():
        service = Service(Settings(port=0, drain_seconds=30), engine, Catalog(entries, {}), Keyring({}))
        await serve_until_signal(service, lambda server: print(server.ports["http"], flush=True))
    run_loop(main())
print("ended", flush=True)
"""


def test_sigterm():
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        port = int(process.stdout.readline())
        with connect(f"ws://127.0.0.1:{port}/v1/stream?endpoint=off") as socket:
            socket.send(pcm(tone("abc")))
            socket.recv(timeout=60)
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                time.sleep(0.05)
            heard, closed = the_end(socket, FINISH)
        assert (heard[-2]["text"], closed.code) == ("Abc.", 1000)
        out, err = process.communicate(timeout=60)
        assert (out, process.returncode) == ("ended\n", 0)
        lines = [line for line in map(json.loads, err.splitlines()) if line["logger"] == "nar_speech.server"]
        events = [line["event"] for line in lines if line["event"] != "request"]
        assert events == ["listening", "draining", "drained"]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    base = tmp_path_factory.mktemp("tls")
    words = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    )
    made = subprocess.run(
        words.split(), cwd=base, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=120
    )
    if made.returncode:
        pytest.skip("no openssl program")
    return base


async def heard_over_tls(url, trust):
    """All messages of one stream. The threaded client reads and writes one TLS connection at once, which
    Python's ssl module does not guard before 3.13: it can hang."""
    async with asyncio_connect(url, ssl=trust) as peer:
        await peer.send(pcm(tone("abc")))
        await peer.send(FINISH)
        return [json.loads(message) async for message in peer]


def test_tls(certificate):
    files = {"ssl_certfile": str(certificate / "cert.pem"), "ssl_keyfile": str(certificate / "key.pem")}
    with ServerThread(Settings(port=0, **files), *tone_entry()) as running:
        trust = ssl.create_default_context(cafile=files["ssl_certfile"])
        trust.check_hostname = False
        assert httpx.get(f"{running.url}/readyz", verify=trust).status_code == 200
        heard = asyncio.run(asyncio.wait_for(heard_over_tls(f"{running.ws}/v1/stream", trust), 60))
        assert heard[-2]["text"] == "Abc."
    wrong = {**files, "ssl_keyfile": files["ssl_certfile"]}
    with pytest.raises(ConfigError, match="ssl-certfile"):
        ServerThread(Settings(port=0, **wrong), *tone_entry())


def test_a_port_that_is_taken():
    with ServerThread(Settings(port=0), *tone_entry()) as running:
        with pytest.raises(ConfigError, match="use another port"):
            ServerThread(Settings(port=running.port), *tone_entry())


def test_doors_that_would_stand_open(caplog):
    with pytest.raises(ConfigError, match="--open-ports"):
        check_security(Settings(wyoming_port=10300), True)
    check_security(Settings(wyoming_port=10300, open_ports=True), True)
    check_security(Settings(), False)
    assert not caplog.records
    check_security(Settings(host="0.0.0.0"), False)
    assert "no API keys" in caplog.text


def parsed(*words):
    return command.settings_of(cli.build_parser().parse_args(["serve", *words]))


def test_options():
    assert parsed() == Settings()
    words = "--model mini=default --alias a=mini --port 1 --funasr-port 2 --wyoming-port 3 --limit-streams 2"
    words += " --max-upload-mb 1.5 --cors-origin https://x --idle-seconds 9 --no-page --open-ports"
    settings = parsed(*words.split())
    assert settings.models == (ModelSpec("mini", ("default",)),)
    assert (settings.funasr_port, settings.limits.streams, settings.max_upload_bytes) == (2, 2, 3 << 19)
    assert (settings.aliases, settings.page, settings.cors_origins) == ({"a": "mini"}, False, ("https://x",))
    for wrong in (["--alias", "a"], ["--model", "a="], ["--limit-requests", "0"], ["--max-streams", "0"]):
        with pytest.raises(ConfigError):
            parsed(*wrong)


def test_one_line_names_the_extra_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(command, "NEEDED", ("fastapi", "no_such_package"))
    for words in (["serve"], ["bench", "streams"]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert re.search(r"no_such_package.*pip install 'nar-speech\[serve\]'\n$", err)
        assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["serve", "--port", "99999"], ["bench", "streams", "--n", "x"]])
def test_bad_options_are_one_line(words, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_is_quick_and_needs_no_server_packages():
    code = "import sys, nar_speech.cli as c; c.build_parser(); print({'torch', 'fastapi'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "set()\n"


def corpus():
    return [bench.Utterance(tone(text), text) for text in ("abcd", "xyz", "klmnop")]


def test_load_on_an_engine():
    models = {"tones": ToneModel()}
    settings = {"endpoint": False}
    paced = bench.bench_engine(models, "tones", corpus(), 3, 2.0, True, settings)
    assert (paced.failed, paced.wer, paced.streams) == (0, 0.0, 3)
    assert paced.utterances >= 3
    assert paced.audio_seconds <= 3 * paced.seconds
    assert paced.chunk_latency[0] <= paced.chunk_latency[2]
    assert paced.chunks >= 10 * paced.audio_seconds - 3
    assert paced.rss_peak >= paced.rss_start > 0 or not os.path.exists("/proc/self/statm")
    quick = bench.bench_engine(models, "tones", corpus(), 3, 0.5, False, settings)
    assert (quick.failed, quick.wer, quick.held) == (0, 0.0, False)
    assert quick.utterances > 0
    table = list(bench.lines([paced, quick]))
    assert len(table) == 3
    assert len({len(line) for line in table}) == 1
    wrong = [bench.Utterance(tone("abcd"), "abce")]
    assert bench.bench_engine(models, "tones", wrong, 1, 0.2, False, settings).wer == 1.0


def test_load_on_a_server():
    with ServerThread(Settings(port=0), *tone_entry()) as running:
        found = bench_server(Target(running.url, "tones"), corpus(), 2, 1.5, True, 0.1, "en")
        assert (found.failed, found.wer) == (0, 0.0)
        assert found.utterances >= 2
        assert found.chunks >= 10 * found.audio_seconds - 2
        assert found.rss_start > 0 or not os.path.exists("/proc/self/statm")
        refused = bench_server(Target(running.url, "none"), corpus(), 1, 0.2, True, 0.1, "en")
        assert refused.failed == 1
    with pytest.raises(InputError, match="--url"):
        bench_server(Target(running.url), corpus(), 1, 0.2, True, 0.1, "en")
