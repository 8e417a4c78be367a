"""Label priors: what a CTC model expects of any frame, taken out before a language model has its say.

A CTC model learns how often each label occurs in its training texts, and blank above all. Under a language
model that counts twice: EESEN (Miao et al. 2015, arXiv 1507.08240, section 4.2) divides the posteriors by the
prior, as hybrid systems do.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-5  # probability of labels that never occur: dividing by less would favour them wildly


def label_prior(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Natural log of the mean posterior of each label.

    Args:
        log_probs: (B, T, V) natural logs.
        lengths: (B,) frames of each utterance.

    Returns:
        (V,) float32.
    """
    valid = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]
    return log_probs[valid].double().exp().mean(0).clamp_min(LEAST).log().float()


def divide_by_prior(log_probs: Tensor, prior: Tensor, weight: float) -> Tensor:
    """Posteriors over the prior to the power of ``weight``, again of sum one in every frame.

    Args:
        log_probs: (B, T, V) natural logs.
        prior: (V,), see :func:`label_prior`.
    """
    return (log_probs - weight * prior.to(log_probs)).log_softmax(-1)
