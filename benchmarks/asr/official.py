"""The funasr package's model of a folder, as its users make it."""

from pathlib import Path

import torch


def auto_model(folder: Path):
    """funasr's AutoModel on the CPU, with PyTorch's number of threads, silent."""
    from funasr import AutoModel

    return AutoModel(
        model=str(folder),
        device="cpu",
        ncpu=torch.get_num_threads(),
        disable_update=True,
        disable_pbar=True,
        log_level="ERROR",
    )
