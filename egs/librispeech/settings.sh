# What egs/common needs to know of LibriSpeech.
# shellcheck shell=bash disable=SC2034
corpus=librispeech
corpus_holds="the folder with train-clean-100, dev-clean ..."
train="train-clean-100 train-clean-360 train-other-500"
dev="dev-clean dev-other"
test="test-clean test-other"
language=en
paraformer_config=paraformer/librispeech.yaml
ctc_config=ctc/librispeech_conformer.yaml
