"""Models of a server: which halves they have, and pairs of two."""

import tests.server_extra  # noqa: F401  skips this file where the extra is missing

# isort: split

import pytest

from nar_speech.errors import ConfigError
from nar_speech.server.models import load_models, load_stream_model
from nar_speech.server.settings import ModelSpec, Settings
from tests.model_folders import CONFORMER, ctc_folder, paraformer_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    causal = {**CONFORMER, "causal": True, "use_dynamic_chunk": True}
    return {
        "ctc": ctc_folder(base / "ctc", encoder_conf=causal),
        "paraformer": paraformer_folder(base / "paraformer", stream={"chunk": [5, 10, 5]}, predictor="v2"),
        "offline": ctc_folder(base / "offline"),
    }


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


def test_a_model_that_hears_files_only_is_no_load(folders):
    with pytest.raises(ConfigError, match="files only"):
        load_stream_model(str(folders["offline"]), "cpu", "float32")
