"""OpenAI's HTTP endpoints, with the official client and without."""

import tests.server_extra  # noqa: F401  skips this file where the extra is missing

# isort: split

import io
import json
import socket
import threading

import httpx
import openai
import pytest
import soundfile

from nar_speech import locate
from nar_speech.server.auth import Keyring, Limits
from nar_speech.server.models import load_models
from nar_speech.server.settings import ModelSpec, Settings
from tests.tone_model import ServerThread, ToneBatch, tone, tone_entry, wait_for

KEY = "secret-key-of-ada"
PATH = "/v1/audio/transcriptions"


def wav(text, rate=16000, format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, tone(text, rate=rate), rate, format=format)
    return file.getvalue()


@pytest.fixture(scope="module")
def server():
    settings = Settings(port=0, max_upload_bytes=1 << 20, max_upload_seconds=30, stall_seconds=5)
    with ServerThread(settings, *tone_entry()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server.url, timeout=60) as web:
        yield web


def send(web, data=None, file=None, **more):
    file = ("a.wav", wav("abc")) if file is None else file
    return web.post(PATH, files={"file": file}, data={"model": "tones"} if data is None else data, **more)


def create(client, **fields):
    return client.audio.transcriptions.create(**{"model": "tones", **fields})


def error_of(answer):
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def test_json(client):
    result = create(client, file=("a.wav", wav("hello a")), model="whisper-1", temperature=0.0)
    assert result.text == "Heloa."  # a letter that is held is one letter
    assert result.usage.type == "duration"
    assert result.usage.seconds == pytest.approx(1.4)


def test_text_and_subtitles(client):
    def ask(style):
        return create(client, file=wav("abc"), response_format=style)

    assert ask("text") == "Abc.\n"
    assert ask("srt") == "1\n00:00:00,000 --> 00:00:00,600\nAbc.\n\n"
    assert ask("vtt") == "WEBVTT\n\n00:00:00.000 --> 00:00:00.600\nAbc.\n\n"


def test_verbose_json(client):
    result = create(
        client,
        file=wav(" abc"),
        model="gpt-4o-transcribe",
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        language="en",
    )
    assert (result.text, result.language, result.duration) == ("Abc.", "english", pytest.approx(0.8))
    assert [(w.word, w.start, w.end) for w in result.words] == [
        ("a", 0.2, 0.4),
        ("b", 0.4, 0.6),
        ("c", 0.6, 0.8),
    ]
    (segment,) = result.segments
    assert (segment.id, segment.start, segment.end, segment.tokens) == (0, 0.2, 0.8, [0, 1, 2])
    result = create(client, file=wav("abc"), response_format="verbose_json")
    assert result.words is None
    assert len(result.segments) == 1


def test_granularities_without_brackets(web):
    data = {"model": "tones", "response_format": "verbose_json", "timestamp_granularities": "word"}
    assert len(send(web, data).json()["words"]) == 3


def test_stream(client):
    events = list(create(client, file=wav("abc"), stream=True))
    assert [e.type for e in events] == ["transcript.text.delta", "transcript.text.done"]
    assert "".join(e.delta for e in events[:-1]) == events[-1].text == "Abc."
    assert events[-1].usage.total_tokens == events[-1].usage.input_tokens + events[-1].usage.output_tokens


def test_long_files_are_cut_at_pauses(client, monkeypatch):
    """Pieces come back in order, in the time of the file. (Tones are no speech for Silero: replaced.)"""

    class Energy:
        def at(self, rate):
            return lambda lanes: (lanes**2).mean(axis=2) ** 0.5 * 2

    def ask(**more):
        text = "abc" + " " * 20 + "def" + " " * 20 + "ghi" + " " * 20 + "jkl"
        file = ("a.flac", wav(text, format="FLAC"))
        return create(client, file=file, **more)

    server_vad = "nar_speech.server.offline.SharedVad.at"
    monkeypatch.setattr(server_vad, lambda self, rate: Energy().at(rate))
    monkeypatch.setattr("nar_speech.server.uploads.Segmenter", _short_segmenter())
    result = ask(response_format="verbose_json", timestamp_granularities=["word"])
    assert result.text == "Abc. Def. Ghi. Jkl."
    starts = {w.word: w.start for w in result.words}
    assert starts["d"] == pytest.approx(4.6, abs=0.15)
    assert starts["j"] == pytest.approx(13.8, abs=0.15)
    events = list(ask(stream=True))
    assert [e.delta for e in events[:-1]] == ["Abc.", " Def.", " Ghi.", " Jkl."]
    assert events[-1].text == result.text


def _short_segmenter():
    from nar_speech.model_folder import SegmentConfig
    from nar_speech.pipelines.segment import Segmenter

    config = SegmentConfig(
        whole=1.0, merge=1.0, longest=5.0, gap=0.5, min_speech=0.1, min_silence=0.2, pad=0.1
    )
    return lambda _, rate, vad: Segmenter(config, rate, vad)


def test_logprobs(client):
    result = create(client, file=wav("ab"), include=["logprobs"])
    assert [p.token for p in result.logprobs] == ["a", "b"]
    assert result.logprobs[0].logprob == pytest.approx(-0.105, abs=1e-3)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_other_rates_and_formats(client, rate):
    file = ("a.ogg", wav("abc", rate, "OGG"))
    assert create(client, file=file).text == "Abc."


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tones", "model", "nar-speech")
    assert client.models.retrieve("whisper-1").id == "whisper-1"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("none/such")
    assert error.value.code == "model_not_found"


def test_errors_reach_the_client(client):
    def ask(**more):
        return create(client, **{"file": wav("abc"), "model": "tones", **more})

    with pytest.raises(openai.NotFoundError) as error:
        ask(model="gpt-99")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as error:
        ask(response_format="pdf")
    assert (error.value.param, error.value.type) == ("response_format", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="knows en"):
        ask(language="fr")
    with pytest.raises(openai.BadRequestError, match="not audio"):
        ask(file=("a.wav", b"this is not audio at all, is it?"))
    with pytest.raises(openai.BadRequestError, match="spell") as error:
        ask(extra_body={"hotwords": "naïve"})
    assert error.value.param == "hotwords"
    assert ask(prompt="naïve, Ada", language="en-US").text == "Abc."


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"stream": "perhaps"}, "stream"),
        ({"timestamp_granularities[]": "letter"}, "timestamp_granularities"),
        ({"keywords[]": ["x" * 101]}, "keywords"),
        ({"response_format": "diarized_json"}, "response_format"),
    ],
)
def test_fields_that_are_wrong(web, data, param):
    answer = send(web, {"model": "tones", **data})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


def test_unknown_fields_are_ignored(web):
    data = {"model": "", "chunking_strategy": "auto", "known_speaker_names[]": ["a", "b"], "foo": "bar"}
    assert send(web, data).json()["text"] == "Abc."


def test_forms_that_are_wrong(web):
    def status(**request):
        answer = web.post(PATH, **request)
        return answer.status_code, error_of(answer)["message"]

    assert status(data={"model": "tones"})[0] == 415
    assert status(json={"model": "tones"})[0] == 415
    assert status(files={"model": (None, "tones")}) == (
        400,
        "file: missing; send the recording as multipart field 'file'",
    )
    assert status(files={"file": (None, "text")})[0] == 400
    assert "empty" in status(files={"file": ("a.wav", b"")})[1]
    assert "several" in status(files=[("file", ("a", b"x")), ("file", ("b", b"y"))])[1]
    plain = {"content-type": "multipart/form-data"}
    assert status(content=b"--x\r\n", headers=plain)[0] == 400
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert status(content=b"garbage" * 10, headers=broken)[0] == 400
    cut = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
    assert status(content=cut, headers=broken)[0] == 400


def test_too_large_and_too_long(web):
    big = ("a.wav", b"\0" * (4 << 20))
    answer = send(web, file=big)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")
    answer = send(web, file=("a.wav", b"\0" * ((1 << 20) + 1)))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")

    def endless():
        yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(64):
            yield b"\0" * (1 << 16)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert web.post(PATH, content=endless(), headers=headers).status_code == 413
    long = wav("a" * 160, rate=8000)
    answer = send(web, file=("a.wav", long))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "audio_too_long")
    events = send(web, {"model": "tones", "stream": "true"}, ("a.wav", long)).text
    assert json.loads(events.split("\n\n")[0].removeprefix("data: "))["error"]["code"] == "audio_too_long"


def test_errors_in_a_stream_are_raised_by_the_client(client):
    with pytest.raises(openai.APIError, match="not audio"):
        list(create(client, file=("a.wav", b"nothing here" * 9), stream=True))


def test_other_routes_and_methods(web):
    assert error_of(web.get("/v2"))["code"] == "not_found"
    assert web.get(PATH).status_code == 405
    assert web.get("/v1/models").headers["x-request-id"].startswith("req_")
    page = web.get("/")
    assert "<title>Live transcription</title>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_model_without_an_offline_half_takes_files_too():
    with ServerThread(Settings(port=0, max_upload_seconds=30), *tone_entry(second=False)) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
            file = wav("abc" + " " * 6 + "xyz")
            result = create(client, file=file, response_format="verbose_json")
            assert result.text == "abc xyz"
            assert [round(s.start, 1) for s in result.segments] == [0.0, 1.8]
            with pytest.raises(openai.BadRequestError, match="spell"):
                create(client, file=file, extra_body={"hotwords": "naïve"})


class SlowBatch(ToneBatch):
    """Waits for a word before it answers."""

    def __init__(self):
        self.go, self.waves = threading.Event(), 0

    def run(self, waves, options):
        self.waves += len(waves)
        self.go.wait(30)
        return super().run(waves, options)


@pytest.fixture
def slow():
    entries, models = tone_entry()
    batch = models["tones:offline"] = SlowBatch()
    settings = Settings(port=0, max_uploads=1, waiting_uploads=1)
    with ServerThread(settings, entries, models) as running:
        running.batch = batch
        yield running
        batch.go.set()


def test_more_files_than_may_wait_are_refused(slow):
    with httpx.Client(base_url=slow.url, timeout=60) as web:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(send(web))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: slow.service.at_work == 2)
        refused = send(web)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        slow.batch.go.set()
        for thread in threads:
            thread.join()
        assert [a.json()["text"] for a in answers] == ["Abc."] * 2
        metrics = web.get("/metrics").text
        assert 'requests_rejected_total{api="openai_http",status="503"} 1.0' in metrics


def test_a_client_that_hangs_up_frees_its_place(slow):
    body = wav("abc")
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=x\r\n"
        "content-length: {n}\r\n\r\n"
    )
    form = (
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + body + b"\r\n--x--\r\n"
    )
    for data in (form, form[:100]):
        with socket.create_connection(("127.0.0.1", slow.port)) as raw:
            raw.sendall(head.format(n=len(form)).encode() + data)
            if data is form:
                wait_for(lambda: slow.batch.waves == 1)
        wait_for(lambda: slow.service.at_work == 0)
    text = httpx.get(f"{slow.url}/metrics").text
    assert 'mode="transcription",outcome="cancelled"} 2.0' in text


def test_keys_and_limits(tmp_path):
    from nar_speech.server.auth import read_keys

    file = tmp_path / "keys"
    file.write_text(f"{KEY} name=ada requests=3\nsecret-key-of-bob name=bob minutes=0.01\n")
    keys = read_keys(file, Limits(), "")
    assert Keyring(keys).check(KEY).name == "ada"
    with ServerThread(Settings(port=0), *tone_entry(), keys=keys) as running:
        make = lambda key: openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)  # noqa: E731
        for key in ("wrong-key", "x"):
            with pytest.raises(openai.AuthenticationError) as error:
                create(make(key), file=wav("abc"))
            assert error.value.code == "invalid_api_key"
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/readyz").status_code == 200
        assert httpx.get(f"{running.url}/v1/models", headers={"x-api-key": KEY}).status_code == 200
        ada, bob = make(KEY), make("secret-key-of-bob")
        for _ in range(3):
            assert create(ada, file=wav("abc")).text == "Abc."
        with pytest.raises(openai.RateLimitError, match="3 requests a minute") as error:
            create(ada, file=wav("abc"))
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert create(bob, file=wav("abcabc")).text == "Abcabc."
        with pytest.raises(openai.RateLimitError, match=r"0\.01 minutes of audio a day"):
            create(bob, file=wav("abc"))


def test_pages_of_other_origins():
    settings = Settings(port=0, cors_origins=("https://a.example",), page=False)
    with ServerThread(settings, *tone_entry()) as running:
        ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
        answer = httpx.options(f"{running.url}{PATH}", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        answer = httpx.get(f"{running.url}/v1/models", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in answer.headers
        assert httpx.get(running.url).status_code == 404


def test_the_embedded_model_end_to_end():
    """The offline half as ``nar-speech serve`` loads it, with real speech."""
    settings = Settings(port=0, models=(ModelSpec("mini", ("mini_en",)),), device="cpu")
    entries, models = load_models(settings)
    with ServerThread(settings, entries, models) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0, timeout=120) as client:
            with open(locate.ASSETS / "sample.flac", "rb") as file:
                result = create(
                    client,
                    file=file,
                    model="mini",
                    response_format="verbose_json",
                    timestamp_granularities=["word", "segment"],
                )
            expected = (locate.ASSETS / "sample.txt").read_text().strip()
            assert result.text == expected
            assert " ".join(w.word for w in result.words) == expected
            with pytest.raises(openai.BadRequestError, match="spell"):
                create(client, file=wav("a"), model="mini", extra_body={"hotwords": "日本"})
