"""Models of a server: which halves they have, and pairs of two."""

import tests.server_extra  # noqa: F401  skips this file where the extra is missing

# isort: split

import pytest

from nar_speech import hub, locate
from nar_speech.audio import read_audio
from nar_speech.engine.asr_offline import OfflineModel
from nar_speech.errors import ConfigError
from nar_speech.pipelines.transcribe import Transcriber
from nar_speech.server.formats import log_prob
from nar_speech.server.models import load_models, load_stream_model, with_twin
from nar_speech.server.settings import ModelSpec, Settings
from tests.model_folders import stream_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return stream_folders(tmp_path_factory.mktemp("models"))


def test_halves_of_models(folders):
    specs = (
        ModelSpec("both", (str(folders["ctc"]),)),
        ModelSpec("live", (str(folders["paraformer"]),)),
        ModelSpec("pair", (str(folders["offline"]), str(folders["paraformer"]))),
    )
    entries, models = load_models(Settings(models=specs, device="cpu"))
    assert [(e.id, e.batch_key is not None, e.stream_key is not None) for e in entries] == [
        ("both", True, True),
        ("live", False, True),
        ("pair", True, True),
    ]
    assert sorted(models) == ["both:offline", "both:online", "live:online", "pair:offline", "pair:online"]
    wrong = ModelSpec(None, (str(folders["ctc"]), str(folders["offline"])))
    with pytest.raises(ConfigError, match="can't be the streaming half"):
        load_models(Settings(models=(wrong,), device="cpu"))


def test_the_embedded_models_are_a_pair_where_both_are_installed(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "ASSETS", tmp_path)
    (tmp_path / hub.DEFAULT_MODEL).symlink_to(folders["offline"])
    assert with_twin(("default",)) == ("default",)
    (tmp_path / hub.TWIN).symlink_to(folders["ctc"])
    for name in ("default", hub.DEFAULT_MODEL):
        assert with_twin((name,)) == (hub.DEFAULT_MODEL, hub.TWIN)
    assert with_twin((hub.TWIN,)) == (hub.TWIN,)
    ((entry,), models) = load_models(Settings(device="cpu"))
    assert list(models) == [entry.batch_key, entry.stream_key]
    assert load_stream_model("default", "cpu", "float32")[0] == "tiny_ctc"


def test_chunks_of_a_server(folders):
    spec = (ModelSpec("m", (str(folders["ctc"]),)),)
    for sizes, wanted in (((None, None), (16, 64)), ((4, None), (4, 16)), ((4, 8), (4, 8))):
        chunk_size, left = sizes
        _, models = load_models(Settings(models=spec, device="cpu", chunk_size=chunk_size, left=left))
        chunking = models["m:online"].model.stream.chunking
        assert (chunking.frames, chunking.left) == wanted


@pytest.mark.parametrize("sizes", [{"chunk_size": 0}, {"left": -1}])
def test_chunks_that_make_no_sense(sizes):
    with pytest.raises(ConfigError, match=next(iter(sizes)).replace("_", "-")):
        Settings(**sizes)


def test_a_model_that_hears_files_only_is_no_load(folders):
    with pytest.raises(ConfigError, match="files only"):
        load_stream_model(str(folders["offline"]), "cpu", "float32")


@pytest.mark.parametrize("verify", [True, False])
def test_tokens_of_the_embedded_model_join_to_its_text(verify):
    """Those of ``logprobs``, whichever tokenizer they are of."""
    model = OfflineModel(Transcriber.from_folder(hub.resolve("default"), "cpu"))
    wave = read_audio(locate.ASSETS / "sample.flac", model.sample_rate).samples[: 4 * model.sample_rate]
    (found,) = model.run([wave], [{"verify": verify}])
    tokens = [log_prob(token) for segment in found.segments for token in segment.tokens]
    assert "".join(token["token"] for token in tokens).strip() == found.text
    assert found.text.lower().startswith("may i have a dark roast")
