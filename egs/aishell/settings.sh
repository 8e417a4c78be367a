# What egs/common needs to know of AISHELL-1.
# shellcheck shell=bash disable=SC2034
corpus=aishell
corpus_holds="the folder that holds data_aishell"
train=train
dev=dev
test=test
language=zh
paraformer_config=paraformer/aishell.yaml
ctc_config=ctc/aishell_u2pp.yaml
