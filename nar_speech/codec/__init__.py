"""Neural codecs: sound to tokens and back; :func:`nar_speech.codec.load.load_codec` loads one by name."""

from nar_speech.codec.base import Codec
from nar_speech.codec.dac import DacCodec
from nar_speech.codec.encodec import EncodecCodec
from nar_speech.codec.maskgct import MaskGCTCodec
from nar_speech.codec.mimi import MimiCodec
from nar_speech.codec.spectral import SpectralCodec

CODECS: dict[str, type[Codec]] = {
    "encodec": EncodecCodec,
    "dac": DacCodec,
    "mimi": MimiCodec,
    "maskgct": MaskGCTCodec,
    "spectral": SpectralCodec,
}
