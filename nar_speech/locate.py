"""Where a model lies: embedded ones, local folders, repositories of the hub and their downloads.

Nothing here knows what is in a folder; :mod:`nar_speech.hub` reads recognisers and sound generators,
:mod:`nar_speech.codec.load` codecs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from nar_speech import config as configs
from nar_speech.errors import HubError
from nar_speech.types import ModelCard

ASSETS = Path(__file__).parent / "assets"
DEFAULT_MODEL = "mini_en"
TWIN = "mini_en_stream"  # the embedded model that hears live speech
ALIASES = {  # names that FunASR's users know -> hub repository
    "paraformer-zh": "funasr/paraformer-zh",
    "paraformer-en": "funasr/paraformer-en",
    "SenseVoiceSmall": "FunAudioLLM/SenseVoiceSmall",
}
CACHE_VARIABLE = "NAR_SPEECH_CACHE"

_HUB_ID = re.compile(r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?$")


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/model.yaml"))


def read_card(name: str) -> ModelCard:
    """The card of an embedded model; reads nothing else."""
    path = ASSETS / name / "model.yaml"
    return configs.from_dict(ModelCard, configs.read_yaml(path).get("card") or {}, f"{path}: card")


def resolve(
    name: str | Path = "default",
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    only: Sequence[str] | None = None,
) -> Path:
    """The local folder of a model, or its ``.nemo`` file, downloaded first if need be.

    Args:
        name: ``default`` or another embedded model, a folder, a ``.nemo`` file, an alias such as
            ``paraformer-zh``, or a hub id ``org/name`` or ``org/name@revision``. A folder named like a model
            is given as ``./name``.
        cache_dir: of downloads; default: the environment variable NAR_SPEECH_CACHE, else the hub's own.
        offline: use only what has been downloaded before; default: the environment variable HF_HUB_OFFLINE.
        only: patterns of the files of a repository that are needed, ``codec/*`` for example; None: all.

    Raises:
        HubError: unknown name, no such folder, no network, no such repository; the message says which.
    """
    text = str(name)
    if isinstance(name, str):
        wanted = DEFAULT_MODEL if name == "default" else name
        if wanted in embedded_models():
            return ASSETS / wanted
        if name in ("default", TWIN):
            raise HubError(
                f"model '{name}': nar_speech/assets/{wanted} is not in this installation; install the package"
                " again, or name a model with --model"
            )
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".nemo":
            return path
        raise HubError(f"{text}: is a file; name the model folder it lies in")
    if text.startswith((".", "/", "~")) or isinstance(name, Path):
        raise HubError(f"{text}: no such model folder; check the path")
    match = _HUB_ID.match(ALIASES.get(text, text))
    if match is None:
        raise HubError(_unknown(text))
    return _download(text, match[1], match[2], cache_dir, offline, only)


def _download(
    name: str,
    repository: str,
    revision: str | None,
    cache_dir: str | Path | None,
    offline: bool | None,
    only: Sequence[str] | None,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = name if name.partition("@")[0] == repository else f"{name} ({repository})"
    cache = cache_dir or os.environ.get(CACHE_VARIABLE) or None
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache,
                local_files_only=offline,
                allow_patterns=None if only is None else list(only),
                # Weights, configurations, vocabularies: no code, no pictures, no sample recordings.
                ignore_patterns=[
                    "*.py",
                    "*.md",
                    "*.png",
                    "*.jpg",
                    "*.gif",
                    "*.mp3",
                    "*.wav",
                    "*.onnx",
                    "example/*",
                ],
            )
        )
    except RevisionNotFoundError as error:
        raise HubError(f"{where}: has no revision '{revision}'; check it on the hub") from error
    except GatedRepoError as error:
        raise HubError(
            f"{where}: asks for consent; accept its terms on huggingface.co and log in first"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{where}: no such repository on huggingface.co; {_known(name)}") from error
    except HFValidationError as error:
        raise HubError(_unknown(name)) from error
    except LocalEntryNotFoundError as error:
        if offline:
            raise HubError(
                f"{where}: has not been downloaded and offline mode is on; run once without"
                f" --offline and HF_HUB_OFFLINE, or set {CACHE_VARIABLE} to the cache that has it"
            ) from error
        raise HubError(_no_network(name)) from error
    except Exception as error:  # the hub client lets the errors of its HTTP library through
        raise HubError(_no_network(name)) from error


def _no_network(name: str) -> str:
    return (
        f"{name}: huggingface.co can't be reached and the model has not been downloaded before; check the"
        " network, or give a local folder"
    )


def _unknown(name: str) -> str:
    return f"{name or '(empty name)'}: no such model or folder; {_known(name)}"


def _known(name: str) -> str:
    known = ["default", *embedded_models(), *ALIASES]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}give a folder, a hub id org/name, or one of {', '.join(known)}"
