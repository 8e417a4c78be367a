# What run.sh and prepare.sh need to know of LibriTTS.
# shellcheck shell=bash disable=SC2034
corpus=libritts
corpus_holds="the folder with train-clean-100, dev-clean ... (LibriTTS or LibriTTS-R)"
train="train-clean-100 train-clean-360 train-other-500"
dev="dev-clean"
test="test-clean"
