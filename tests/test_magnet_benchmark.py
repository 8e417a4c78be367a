"""The benchmark of MAGNeT: its baseline computes what our networks compute, and it runs."""

import json

import torch

from benchmarks import magnet, magnet_official
from nar_speech.models.magnet import Magnet, MagnetConfig
from nar_speech.models.musicgen import MusicGen, MusicGenConfig

NUMBERS = {"num_codebooks": 3, "codebook_size": 9, "width": 24, "heads": 3, "num_blocks": 2, "text_width": 7}


def text_of(network, states, mask):
    return (network.condition_proj(states) * mask.unsqueeze(-1)).detach()


def test_the_official_forward_pass_is_ours():
    torch.manual_seed(0)
    network = Magnet(MagnetConfig(**NUMBERS, context=3)).eval().requires_grad_(False)
    tokens, states = torch.randint(10, (2, 3, 29)), torch.randn(2, 4, 7)
    mask = torch.tensor([[True] * 4, [False] * 4])
    for stage in range(3):
        wanted = network(tokens, None, states, mask, stage)
        got = magnet_official.magnet_forward(network, tokens, text_of(network, states, mask), stage)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
        drawn, scores = magnet_official.magnet_step(
            network, tokens[:1], text_of(network, states, mask), stage, 3, 1
        )
        assert drawn.shape == (1, 29)
        assert scores.shape == (1, 9)


def test_the_official_steps_of_musicgen_are_ours():
    torch.manual_seed(0)
    network = MusicGen(MusicGenConfig(**NUMBERS)).eval().requires_grad_(False)
    sequence, states, mask = (
        torch.randint(10, (2, 3, 5)),
        torch.randn(2, 4, 7),
        torch.ones(2, 4, dtype=torch.bool),
    )
    wanted, cache = network(sequence, states, mask), []
    for place in range(5):
        new = sequence[:, :, place : place + 1]
        got, cache = magnet_official.musicgen_step(network, new, text_of(network, states, mask), cache)
        torch.testing.assert_close(got, wanted[:, :, place], atol=2e-5, rtol=1e-4)


def test_it_runs_and_writes_its_numbers(tmp_path, capsys):
    torch.set_num_threads(1)
    words = ["--size", "tiny", "--seconds", "0.3", "--threads", "1", "--dtypes", "float32", "--reuse", "3"]
    assert magnet.main([*words, "--repeats", "1", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["exact"] for row in rows] == [True, True, False, True, True]
    assert all(row["cpu"] > 0 for row in rows)
    assert "times as fast" in capsys.readouterr().out
