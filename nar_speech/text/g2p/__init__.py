"""Text to the phones of MaskGCT and Metis, and their ids.

:class:`~nar_speech.text.g2p.phonemizer.Phonemizer` takes English, Chinese, the two mixed, French, German,
Japanese and Korean; :class:`~nar_speech.text.g2p.vocabulary.PhoneVocabulary` phones and ids given directly.
docs/text.md has the rules, and where they leave those of the official code.
"""

from nar_speech.text.g2p.phonemizer import Phonemizer, PhonemizerConfig, Phones
from nar_speech.text.g2p.vocabulary import PhoneVocabulary

__all__ = ["PhoneVocabulary", "Phonemizer", "PhonemizerConfig", "Phones"]
