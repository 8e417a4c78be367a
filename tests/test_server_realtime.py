"""OpenAI Realtime transcription: the official client, every audio format, the order of events, errors."""

import tests.server_extra  # noqa: F401  skips this file where the extra is missing

# isort: split

import base64
import io
import json

import httpx
import numpy as np
import openai
import pytest
import soundfile
from websockets.sync.client import connect

from nar_speech.server.auth import Limits, read_keys
from nar_speech.server.settings import Settings
from tests.tone_model import ServerThread, pcm, the_end, tone, tone_entry, wait_for

KEY = "secret-key-of-ada"
DELTA = "conversation.item.input_audio_transcription.delta"
COMPLETED = "conversation.item.input_audio_transcription.completed"
ONE_ITEM = [
    "input_audio_buffer.committed",
    "conversation.item.added",
    "conversation.item.done",
]
SPOKEN = ["input_audio_buffer.speech_started", DELTA, "input_audio_buffer.speech_stopped", *ONE_ITEM]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{KEY} name=ada\nsecret-key-of-bob name=bob streams=1\n")
    return read_keys(path, Limits(), "")


@pytest.fixture(scope="module")
def server(keys):
    settings = Settings(port=0, max_message_bytes=1 << 20, max_stream_seconds=20)
    with ServerThread(settings, *tone_entry(), keys=keys) as running:
        yield running


@pytest.fixture(scope="module")
def plain(keys):
    """Without a second pass."""
    with ServerThread(Settings(port=0), *tone_entry(second=False), keys=keys) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def session(turn=None, rate=24000, kind="audio/pcm", **transcription):
    form = {"type": kind, "rate": rate} if kind == "audio/pcm" else {"type": kind}
    given = {"format": form, "transcription": {"model": "tones", **transcription}, "turn_detection": turn}
    return {"type": "transcription", "audio": {"input": given}}


VAD = {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 100, "silence_duration_ms": 300}


def coded(data):
    return base64.b64encode(data).decode()


def append(connection, data, step=4801):
    """In pieces that cut samples in half."""
    for place in range(0, len(data), step):
        connection.input_audio_buffer.append(audio=coded(data[place : place + step]))


def until(connection, kind, count=1):
    """Events up to the ``count``-th of a kind."""
    events = []
    while sum(event.type == kind for event in events) < count:
        events.append(connection.recv())
        assert events[-1].type != "error", events[-1]
    return events


def merged(events):
    """Types in order; a run of deltas counts once."""
    types = [event.type for event in events]
    return [t for i, t in enumerate(types) if i == 0 or not (t == types[i - 1] == DELTA)]


def join(client, **query):
    return client.realtime.connect(extra_query={"intent": "transcription", **query})


def test_server_vad_with_the_official_client(client):
    with join(client) as connection:
        connection.session.update(session=session(VAD))
        append(connection, pcm(tone("abcd" + " " * 4 + "xyz" + " " * 4, rate=24000)))
        events = until(connection, COMPLETED, 2)
    assert merged(events)[:2] == ["session.created", "session.updated"]
    told = merged(events)[2:]
    assert sorted(set(told)) == sorted({*SPOKEN, COMPLETED})
    items = {e.item_id for e in events if e.type == COMPLETED}
    assert len(items) == 2
    first = next(e.item_id for e in events if e.type == COMPLETED and e.transcript == "Abcd.")
    own = [e for e in events if first in (getattr(e, "item_id", 0), getattr(getattr(e, "item", 0), "id", 0))]
    assert merged(own) == [*SPOKEN[:3], DELTA, *ONE_ITEM, COMPLETED]  # the last letter was not stable before
    assert "".join(e.delta for e in own if e.type == DELTA) == "abcd"
    started, stopped = own[0], next(e for e in own if e.type.endswith("speech_stopped"))
    assert (started.audio_start_ms, stopped.audio_end_ms) == (0, 800)
    assert own[-1].usage.type == "duration"
    assert own[-1].usage.seconds == pytest.approx(0.8)
    committed = [e for e in events if e.type == "input_audio_buffer.committed"]
    assert committed[0].previous_item_id is None
    assert committed[1].previous_item_id == committed[0].item_id
    (second,) = [e for e in events if e.type.endswith("speech_started")][1:]
    assert second.audio_start_ms == 1500  # 100 ms before it was noticed
    assert {e.transcript for e in events if e.type == COMPLETED} == {"Abcd.", "Xyz."}
    assert len({e.event_id for e in events}) == len(events)


def test_order_without_a_second_pass(plain):
    with openai.OpenAI(base_url=f"{plain.url}/v1", api_key=KEY) as client, join(client) as connection:
        connection.session.update(session=session(VAD, 16000))
        append(connection, pcm(tone("abc" + " " * 4)))
        events = until(connection, COMPLETED)
    begin = ["session.created", "session.updated"]
    assert merged(events) == [*begin, *SPOKEN[:3], DELTA, *ONE_ITEM, COMPLETED]
    deltas = "".join(e.delta for e in events if e.type == DELTA)
    assert deltas == events[-1].transcript == "abc"


@pytest.mark.parametrize(
    ("kind", "rate", "subtype"),
    [
        ("audio/pcm", 24000, None),
        ("audio/pcm", 16000, None),
        ("audio/pcmu", 8000, "ULAW"),
        ("audio/pcma", 8000, "ALAW"),
    ],
)
def test_manual_commits_in_every_format(client, kind, rate, subtype):
    def data(text):
        samples = tone(text, rate=rate)
        if subtype is None:
            return pcm(samples)
        path = io.BytesIO()
        soundfile.write(path, samples, rate, format="RAW", subtype=subtype)
        return path.getvalue()

    with join(client) as connection:
        connection.session.update(session=session(None, rate, kind))
        for text in ("abc", "xyz"):
            append(connection, data(text), 1001)
            connection.input_audio_buffer.commit()
        events = until(connection, COMPLETED, 2)
    assert [e.transcript for e in events if e.type == COMPLETED] == ["Abc.", "Xyz."]
    assert not [e for e in events if "speech_" in e.type]
    committed = [e.item_id for e in events if e.type == "input_audio_buffer.committed"]
    assert committed == [e.item_id for e in events if e.type == COMPLETED]


def raw(server, query="?intent=transcription", key=KEY, **more):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return connect(f"{server.ws}/v1/realtime{query}", additional_headers=headers, **more)


def say(socket, kind, **fields):
    socket.send(json.dumps({"type": kind, **fields}))


def hear(socket, kind):
    """The next event of a kind."""
    while True:
        event = json.loads(socket.recv(timeout=30))
        if event["type"] == kind:
            return event


def test_errors_are_events_and_the_session_goes_on(server):
    with raw(server) as socket:
        hear(socket, "session.created")
        for message, code in (
            ("{", "invalid_json"),
            ("[]", "invalid_json"),
            ('{"type": "dance", "event_id": "e1"}', "unknown_event"),
            ('{"type": "input_audio_buffer.append", "audio": "!!!"}', "invalid_base64"),
            ('{"type": "input_audio_buffer.append"}', None),
            ('{"type": "input_audio_buffer.commit"}', "input_audio_buffer_commit_empty"),
            ('{"type": "session.update", "session": 5}', None),
            ('{"type": "session.update", "session": {"type": "realtime"}}', None),
            (json.dumps({"type": "session.update", "session": session(model="gpt-9")}), "model_not_found"),
        ):
            socket.send(message)
            error = hear(socket, "error")["error"]
            assert (error["code"], error["event_id"]) == (code, "e1" if "e1" in message else None)
            assert set(error) == {"type", "code", "message", "param", "event_id"}
        say(socket, "session.update", session=session(None, 16000))
        hear(socket, "session.updated")
        socket.send(pcm(tone("ab")))  # a binary message is audio
        say(socket, "input_audio_buffer.commit")
        assert hear(socket, COMPLETED)["transcript"] == "Ab."
        say(socket, "input_audio_buffer.commit")
        assert hear(socket, "error")["error"]["code"] == "input_audio_buffer_commit_empty"


def test_clear_forgets_what_was_not_committed(server):
    with raw(server) as socket:
        say(socket, "session.update", session=session(None, 16000))
        say(socket, "input_audio_buffer.append", audio=coded(pcm(tone("abc"))))
        say(socket, "input_audio_buffer.clear")
        hear(socket, "input_audio_buffer.cleared")
        say(socket, "input_audio_buffer.commit")
        assert hear(socket, "error")["error"]["code"] == "input_audio_buffer_commit_empty"
        say(socket, "input_audio_buffer.append", audio=coded(pcm(tone("xyz"))))
        say(socket, "input_audio_buffer.commit")
        assert hear(socket, COMPLETED)["transcript"] == "Xyz."


def test_an_update_in_the_middle_finishes_what_was_said(server):
    with raw(server) as socket:
        say(socket, "session.update", session=session(VAD, 16000))
        say(socket, "input_audio_buffer.append", audio=coded(pcm(tone("abc"))))
        say(socket, "session.update", session=session(VAD, 24000))
        assert hear(socket, COMPLETED)["transcript"] == "Abc."
        hear(socket, "session.updated")
        say(socket, "input_audio_buffer.append", audio=coded(pcm(tone("  xyz    ", rate=24000))))
        assert hear(socket, "input_audio_buffer.speech_started")["audio_start_ms"] == 900
        assert hear(socket, COMPLETED)["transcript"] == "Xyz."


def test_a_commit_under_server_vad(server):
    with raw(server) as socket:
        say(socket, "session.update", session=session(VAD, 16000))
        say(socket, "input_audio_buffer.append", audio=coded(pcm(tone("abc"))))
        say(socket, "input_audio_buffer.commit")
        assert hear(socket, COMPLETED)["transcript"] == "Abc."


def test_fields_of_the_beta_api(server):
    with raw(server) as socket:
        old = {"input_audio_format": "pcm16", "input_audio_transcription": {"model": "tones"}}
        say(socket, "transcription_session.update", session={**old, "turn_detection": None})
        told = hear(socket, "transcription_session.updated")["session"]["audio"]["input"]
        assert told["format"]["rate"] == 24000
        say(socket, "input_audio_buffer.append", audio=coded(pcm(tone("ab", rate=24000))))
        say(socket, "input_audio_buffer.commit")
        assert hear(socket, COMPLETED)["transcript"] == "Ab."


def test_logprobs(server):
    with raw(server) as socket:
        wanted = {**session(None, 16000), "include": ["item.input_audio_transcription.logprobs"]}
        say(socket, "session.update", session=wanted)
        say(socket, "input_audio_buffer.append", audio=coded(pcm(tone("ab"))))
        say(socket, "input_audio_buffer.commit")
        assert [p["token"] for p in hear(socket, COMPLETED)["logprobs"]] == ["a", "b"]


def closing(server, **how):
    """The error event and the close code of a connection that is refused."""
    with raw(server, **how) as socket:
        events, closed = the_end(socket)
        return events[-1]["error"], closed.code


def test_who_is_not_let_in(server):
    for how in ({"key": None}, {"key": "wrong-key-of-eve"}):
        error, code = closing(server, **how)
        assert (error["code"], code) == ("invalid_api_key", 1008)
    error, code = closing(server, query="?intent=conversation")
    assert code == 1008
    error, code = closing(server, query="?intent=transcription&model=gpt-9")
    assert (error["code"], code) == ("model_not_found", 1008)


def test_a_key_has_its_streams(server):
    with raw(server, key="secret-key-of-bob") as first:
        first.send(pcm(tone("a", rate=24000)))
        say(first, "input_audio_buffer.commit")
        hear(first, COMPLETED)
        with raw(server, key="secret-key-of-bob") as second:
            second.send(pcm(tone("a", rate=24000)))
            assert hear(second, "error")["error"]["code"] == "rate_limit_exceeded"
            assert the_end(second)[1].code == 1013


def test_secrets_for_browsers(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    address = f"{server.url}/v1/realtime/client_secrets"
    body = {"expires_after": {"anchor": "created_at", "seconds": 60}, "session": session(None, 16000)}
    answer = httpx.post(address, json=body, headers=headers).json()
    assert answer["value"].startswith("ek_")
    assert answer["session"]["type"] == "transcription"
    # A browser can give a key in the subprotocol only; the one the server takes is another one.
    offered = ["realtime", f"openai-insecure-api-key.{answer['value']}"]
    with raw(server, key=None, subprotocols=offered) as socket:
        assert socket.subprotocol == "realtime"
        told = hear(socket, "session.created")["session"]["audio"]["input"]
        assert told["format"] == {"type": "audio/pcm", "rate": 16000}
        assert told["turn_detection"] is None
        socket.send(pcm(tone("ab")))
        say(socket, "input_audio_buffer.commit")
        assert hear(socket, COMPLETED)["transcript"] == "Ab."
    other = {"Authorization": f"Bearer {answer['value']}"}
    assert httpx.post(address, json=body, headers=other).status_code == 401
    for wrong in ({"expires_after": {"seconds": 5}}, {"session": {"type": "realtime"}}, {"session": []}):
        assert httpx.post(address, json=wrong, headers=headers).status_code == 400
    assert httpx.post(address, content=b"{", headers=headers).status_code == 400
    assert httpx.post(address, content=b" " * (17 << 10), headers=headers).status_code == 413
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        assert client.realtime.client_secrets.create(session=session(VAD)).value.startswith("ek_")


def outcomes(server, count):
    """Outcomes of the next connection, once the metrics have ``count`` of them."""
    name = "nar_speech_request_duration_seconds_count"
    labels = [{"api": "realtime", "mode": "websocket", "outcome": o} for o in ("ok", "cancelled")]

    def values():
        return [server.service.metrics.registry.get_sample_value(name, which) or 0 for which in labels]

    wait_for(lambda: sum(values()) == count)
    return values()


def test_clients_that_leave_when_all_was_said_are_no_cancelled_ones():
    with ServerThread(Settings(port=0), *tone_entry()) as running:
        with raw(running, key=None) as socket:
            say(socket, "session.update", session=session(None, 16000))
            socket.send(pcm(tone("ab")))
            say(socket, "input_audio_buffer.commit")
            hear(socket, COMPLETED)
        assert outcomes(running, 1) == [1, 0]
        with raw(running, key=None) as socket:
            say(socket, "session.update", session=session(None, 16000))
            socket.send(pcm(tone("ab")))
        assert outcomes(running, 2) == [1, 1]


def test_half_characters_come_back_as_question_marks(server):
    with raw(server) as socket:
        halves = {**session(None, 16000), "audio": {"input": {"transcription": {"prompt": "\ud800"}}}}
        say(socket, "session.update", session=halves)
        told = hear(socket, "session.updated")["session"]["audio"]["input"]["transcription"]
        assert told["prompt"] == "?"
    headers = {"Authorization": f"Bearer {KEY}"}
    address = f"{server.url}/v1/realtime/client_secrets"
    answer = httpx.post(address, content=json.dumps({"session": halves}), headers=headers)
    assert answer.status_code == 200
    answer = httpx.post(address, content='{"session": {"type": "\\ud800"}}', headers=headers)
    assert answer.status_code == 400


def test_nonsense_without_end_is_ended(server):
    with raw(server) as socket:
        events, closed = the_end(socket, *["nonsense"] * 60)
        assert (events[-1]["error"]["code"], closed.code) == ("too_many_errors", 1008)


def test_a_message_that_is_too_large(server):
    with raw(server) as socket:
        closed = the_end(socket, b"\0" * (2 << 20))[1]
        assert closed is None or closed.code == 1009  # TCP's reset may overtake the close frame


def test_a_stream_that_is_too_long(server):
    with raw(server) as socket:
        say(socket, "session.update", session=session(None, 16000))
        _, closed = the_end(socket, *[np.zeros(8000, "<i2").tobytes()] * 60)
        assert closed.code == 1009
        assert "20 s" in closed.reason
