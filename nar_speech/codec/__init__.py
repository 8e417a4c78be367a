"""Neural codecs: sound to tokens and back; :func:`nar_speech.codec.load.load_codec` loads one by name."""
