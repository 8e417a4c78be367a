"""MaskGCT (Wang et al. 2024, arXiv 2409.00750): from phones to semantic and from these to acoustic codes.

``T2S`` fills masked semantic codes given phones and the codes of a prompt, which stand before them. ``S2A``
fills one layer of acoustic codes after the other given semantic codes, which are added to them; a network of
one layer makes the first, another the rest. How codes are sampled is in :mod:`nar_speech.sampling`;
:mod:`nar_speech.models.maskgct_predictor` is the networks as that loop calls them.

Letters: B items, L positions, D width, V codes of a codebook, K layers of acoustic codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nar_speech.checkpoint import SkipInit, load_strict, read_weights
from nar_speech.config import MAX_VOCABULARY, MAX_WIDTH, check_range
from nar_speech.errors import CheckpointError, InputError
from nar_speech.layers.diffllama import INIT_STD, DiffLlama, DiffLlamaConfig
from nar_speech.layers.packed import merge_projections
from nar_speech.layers.prepare import prepare_products
from nar_speech.losses.masked import masked_cross_entropy
from nar_speech.losses.maskgct import MaskedCodes

FRAME_RATE = 50  # codes per second
SAMPLE_RATE = 16_000  # of the speech that the official length rule counts
EMPTY = "diff_estimator.embed_tokens.weight"  # left over from a Llama base class, without any rows


N = TypeVar("N", bound="MaskedNetwork")


@dataclass(frozen=True)
class Conditions:
    """What a network knows of one item while it is sampled.

    Attributes:
        prefix: (A, D) embeddings before the target; left out of the unconditional pass.
        target: (L, D), added to the embeddings of the target in both passes; None: nothing is.
    """

    prefix: Tensor
    target: Tensor | None = None


class MaskedNetwork(nn.Module):
    """What T2S and S2A share: the core, embeddings of codes and of the mask, and getting ready."""

    def __init__(self, core: DiffLlamaConfig, semantic_size: int, codebook_size: int):
        super().__init__()
        self.mask_id = codebook_size  # the id that stands for a masked code
        self.mask_emb = nn.Embedding(1, core.width)
        self.cond_emb = nn.Embedding(semantic_size, core.width)
        self.diff_estimator = DiffLlama(core)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.mask_emb.weight.device

    def prepare(self, dtype: str = "float32") -> MaskedNetwork:
        """Get ready for inference, in place: it can then be neither trained, saved nor moved.

        Embeddings, gains, the residual and the heads stay in float32; ``dtype`` is that of the blocks'
        products. On a CPU the weights are laid out for its kernels.

        Args:
            dtype: ``float32``; ``bfloat16``, ``float16`` (not on a CPU): products rounded to them; ``int8``
                (CPU): :mod:`nar_speech.layers.quantize`.
        """
        parts = self.named_modules()
        exact = [m for name, m in parts if isinstance(m, nn.Linear) and not name.startswith("diff_estimator")]
        blocks = [(block, (block.self_attn, block.mlp)) for block in self.diff_estimator.layers]
        prepare_products(self, dtype, exact, blocks)
        return self if self.device.type == "cpu" else merge_projections(self)

    def reset_embeddings(self) -> None:
        """Normal embeddings of deviation 0.02, the row of padding zero."""
        for part in self.modules():
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=INIT_STD)
                if part.padding_idx is not None:
                    with torch.no_grad():
                        part.weight[part.padding_idx].zero_()

    def coded(self, table: nn.Embedding, codes: Tensor) -> Tensor:
        """(..., D) rows of a table, the mask's where ``codes`` (...) are :attr:`mask_id`."""
        masked = codes == self.mask_id
        rows = table(codes.masked_fill(masked, 0))
        return torch.where(masked[..., None], self.mask_emb.weight[0].to(rows.dtype), rows)


@dataclass(frozen=True)
class T2SConfig:
    """Numbers of the text-to-semantic network; the defaults are the official ones.

    Attributes:
        width, num_blocks, heads, hidden_scale: see :class:`~nar_speech.layers.diffllama.DiffLlamaConfig`.
        codebook_size: V semantic codes.
        num_phones: rows of the table of phones; the last stands for padding.
        use_phones: whether there are phones at all (Metis can do without).
    """

    width: int = 1536
    num_blocks: int = 16
    heads: int = 16
    hidden_scale: int = 4
    codebook_size: int = 8192
    num_phones: int = 1024
    use_phones: bool = True

    def __post_init__(self) -> None:
        check_range(self, 2, MAX_VOCABULARY, "codebook_size", "num_phones")

    @property
    def core(self) -> DiffLlamaConfig:
        """The Transformer."""
        return DiffLlamaConfig(self.width, self.num_blocks, self.heads, self.hidden_scale, self.use_phones)

    @classmethod
    def from_official(cls, conf: Mapping[str, Any]) -> T2SConfig:
        """From ``model.t2s_model`` of an official configuration."""
        return cls(**official_numbers(conf), codebook_size=conf.get("cond_codebook_size", 8192))


def official_numbers(conf: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the Transformer in official words."""
    names = {"width": "hidden_size", "num_blocks": "num_layers", "heads": "num_heads"}
    return {ours: conf[name] for ours, name in names.items() if name in conf}


@dataclass(frozen=True)
class T2SItem:
    """One utterance to be made.

    Attributes:
        phones: (Lp,) int64 phones of the prompt and of the target; None: without.
        prompt: (P,) int64 semantic codes, perhaps none.
        features: (P + L, F) float32, what Metis is conditioned on besides.
    """

    phones: Tensor | None
    prompt: Tensor
    features: Tensor | None = None


class T2S(MaskedNetwork):
    """Phones and semantic codes in, logits of semantic codes out."""

    def __init__(self, config: T2SConfig):
        super().__init__(config.core, config.codebook_size, config.codebook_size)
        self.config = config
        if config.use_phones:
            self.phone_emb = nn.Embedding(config.num_phones, config.width, padding_idx=config.num_phones - 1)
        self.to_logit = nn.Linear(config.width, config.codebook_size)
        self.reset_embeddings()

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes (..., L), masked ones :attr:`mask_id`, to (..., L, D)."""
        return self.coded(self.cond_emb, tokens)

    def head(self, x: Tensor, stage: int = 0) -> Tensor:
        """(..., D) to logits (..., V)."""
        return self.to_logit(x)

    def prefix(self, phones: Tensor) -> Tensor:
        """Phones (..., Lp) to (..., Lp, D)."""
        return self.diff_estimator.cond_mlp(self.phone_emb(phones))

    def forward(
        self,
        tokens: Tensor,
        time: Tensor,
        lengths: Tensor | None = None,
        phones: Tensor | None = None,
        phone_lengths: Tensor | None = None,
        added: Tensor | None = None,
        *,
        official_padding: bool = False,
    ) -> Tensor:
        """Logits at every position of a batch.

        Args:
            tokens: (B, L) int64, prompts and masks inside.
            time: (B,) diffusion step of each item, in (0, 1].
            lengths: (B,) int64 positions of each item; None: L.
            phones: (B, Lp) int64, padding may hold any phone; None: no phones.
            phone_lengths: (B,) int64; None: Lp.
            added: (B, L, D) added to the embeddings of the codes.
            official_padding: leave the padding of the phones before the codes, as the official code does, so
                that an item depends on how long the phones of its batch mates are.

        Returns:
            (B, L, V) float32 or what autocast gives; those of padding mean nothing.
        """
        return self.head(
            self.hidden(
                tokens, time, lengths, phones, phone_lengths, added, official_padding=official_padding
            )
        )

    def hidden(
        self,
        tokens: Tensor,
        time: Tensor,
        lengths: Tensor | None = None,
        phones: Tensor | None = None,
        phone_lengths: Tensor | None = None,
        added: Tensor | None = None,
        *,
        official_padding: bool = False,
    ) -> Tensor:
        """(B, L, D) before the head; see :meth:`forward`."""
        x = self.embed(tokens)
        x = x if added is None else x + added
        mask = length_mask(lengths, x)
        if phones is None:
            return self.diff_estimator(x, time, mask)
        if not self.config.use_phones:
            raise InputError("phones: this network was made without phones")
        prefix, size = self.prefix(phones), phones.shape[1]
        x, mask = torch.cat([prefix, x], 1), torch.cat([length_mask(phone_lengths, prefix), mask], 1)
        if official_padding:
            return self.diff_estimator(x, time, mask)[:, size:]
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)  # padding to the end
        index = order[..., None].expand_as(x)
        y = self.diff_estimator(x.gather(1, index), time, mask.gather(1, order))
        return torch.empty_like(y).scatter(1, index, y)[:, size:]

    def condition(self, item: T2SItem, stage: int, length: int) -> Conditions:
        """What is known of an item of ``length`` positions besides its prompt's.

        Raises:
            InputError: ids that do not exist, no phones where the network needs some, or features.
        """
        if item.features is not None:
            raise InputError("features: this network is conditioned on phones and a prompt alone")
        return Conditions(self._prefix(item))

    def _prefix(self, item: T2SItem) -> Tensor:
        """(Lp + P, D) embeddings of phones and prompt."""
        check_ids("prompt", item.prompt, self.config.codebook_size, 1)
        prompt = self.cond_emb(item.prompt.to(self.device))
        if item.phones is None:
            return prompt
        if not self.config.use_phones:
            raise InputError("phones: this network was made without phones")
        check_ids("phones", item.phones, self.config.num_phones, 1)
        if len(item.phones) == 0:
            raise InputError("phones: there are none; give a text with at least one letter")
        return torch.cat([self.prefix(item.phones.to(self.device)), prompt])


@dataclass(frozen=True)
class S2AConfig:
    """Numbers of a semantic-to-acoustic network; the defaults are those of the official full one.

    Attributes:
        width, num_blocks, heads, hidden_scale: see :class:`~nar_speech.layers.diffllama.DiffLlamaConfig`.
        num_codebooks: K layers of acoustic codes that it can make; 1 for the network of the first layer.
        codebook_size: V acoustic codes of a layer.
        semantic_size: semantic codes.
    """

    width: int = 1024
    num_blocks: int = 16
    heads: int = 16
    hidden_scale: int = 4
    num_codebooks: int = 12
    codebook_size: int = 1024
    semantic_size: int = 8192

    def __post_init__(self) -> None:
        check_range(self, 1, MAX_WIDTH, "num_codebooks")
        check_range(self, 2, MAX_VOCABULARY, "codebook_size", "semantic_size")

    @property
    def core(self) -> DiffLlamaConfig:
        """The Transformer."""
        return DiffLlamaConfig(self.width, self.num_blocks, self.heads, self.hidden_scale, True)

    @classmethod
    def from_official(cls, conf: Mapping[str, Any]) -> S2AConfig:
        """From ``model.s2a_model.s2a_1layer`` or ``s2a_full`` of an official configuration."""
        names = {
            "num_codebooks": "num_quantizer",
            "codebook_size": "codebook_size",
            "semantic_size": "cond_codebook_size",
        }
        return cls(
            **official_numbers(conf), **{ours: conf[name] for ours, name in names.items() if name in conf}
        )


@dataclass(frozen=True)
class S2AItem:
    """One utterance to be made.

    Attributes:
        semantic: (P + L,) int64 semantic codes of the prompt and of the target.
        prompt: (P, K) int64 acoustic codes of the prompt, perhaps none; a network of fewer layers reads the
            first ones alone.
    """

    semantic: Tensor
    prompt: Tensor


class S2A(MaskedNetwork):
    """Semantic codes and layers of acoustic codes in, logits of one layer out."""

    def __init__(self, config: S2AConfig):
        super().__init__(config.core, config.semantic_size, config.codebook_size)
        self.config = config
        count, width, size = config.num_codebooks, config.width, config.codebook_size
        self.layer_emb = nn.Embedding(count, width)
        self.token_emb = nn.ModuleList(nn.Embedding(size, width) for _ in range(count))
        self.to_logits = nn.ModuleList(nn.Linear(width, size) for _ in range(count))
        self.reset_embeddings()

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes (..., K, L), masked ones :attr:`mask_id`, to the sum of their embeddings (..., L, D).

        Raises:
            InputError: another number of layers.
        """
        if tokens.dim() < 2 or tokens.shape[-2] != self.config.num_codebooks:
            raise InputError(
                f"tokens: expected (..., {self.config.num_codebooks}, positions), got {tuple(tokens.shape)}"
            )
        return sum(self.coded(table, tokens[..., k, :]) for k, table in enumerate(self.token_emb))

    def head(self, x: Tensor, stage: int) -> Tensor:
        """(..., D) to logits (..., V) of layer ``stage``."""
        return self.to_logits[stage](x)

    def added(self, semantic: Tensor, stage: int) -> Tensor:
        """Semantic codes (..., L) to what is added to the embeddings (..., L, D) for layer ``stage``."""
        condition = self.cond_emb(semantic) + self.layer_emb.weight[stage]
        return self.diff_estimator.cond_mlp(condition)

    def forward(
        self,
        tokens: Tensor,
        time: Tensor,
        semantic: Tensor,
        stage: int,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits of one layer at every position of a batch.

        Args:
            tokens: (B, K, L) int64, prompts and masks inside.
            time: (B,) diffusion step of each item, in (0, 1].
            semantic: (B, L) int64.
            stage: the layer, from 0.
            lengths: (B,) int64 positions of each item; None: L.

        Returns:
            (B, L, V); those of padding mean nothing.

        Raises:
            InputError: a layer that does not exist, or shapes that do not fit.
        """
        if not 0 <= stage < self.config.num_codebooks:
            raise InputError(f"stage: got {stage}; must be 0 to {self.config.num_codebooks - 1}")
        x = self.embed(tokens) + self.added(semantic, stage)
        return self.head(self.diff_estimator(x, time, length_mask(lengths, x)), stage)

    def condition(self, item: S2AItem, stage: int, length: int) -> Conditions:
        """What is known of an item of ``length`` positions besides its prompt's while ``stage`` is made.

        Raises:
            InputError: ids that do not exist, or a number of codes that does not fit.
        """
        config = self.config
        check_ids("semantic codes", item.semantic, config.semantic_size, 1)
        check_ids("acoustic prompt", item.prompt, config.codebook_size, 2)
        frames, layers = item.prompt.shape
        if layers < config.num_codebooks:
            raise InputError(f"acoustic prompt: {layers} layers; this network reads {config.num_codebooks}")
        if len(item.semantic) != frames + length:
            raise InputError(
                f"semantic codes: {len(item.semantic)} for a prompt of {frames} and a target of {length}"
                " frames; they must cover both"
            )
        added = self.added(item.semantic.to(self.device), stage)
        prompt = self.embed(item.prompt[:, : config.num_codebooks].T.to(self.device))
        return Conditions(prompt + added[:frames], added[frames:])


def length_mask(lengths: Tensor | None, x: Tensor) -> Tensor:
    """(B, L) bool, true on positions of x (B, L, D) that are no padding."""
    if lengths is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]


def check_ids(what: str, ids: Tensor, size: int, dims: int) -> None:
    """Whether ``ids`` are whole numbers in [0, size) with ``dims`` axes.

    Raises:
        InputError: they are not.
    """
    if ids.dim() != dims or ids.dtype != torch.int64:
        raise InputError(f"{what}: expected int64 ids with {dims} axes, got {ids.dtype} {tuple(ids.shape)}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise InputError(
            f"{what}: ids {int(ids.min())} to {int(ids.max())}; this network knows 0 to {size - 1}"
        )


def load_network(cls: type[N], config: T2SConfig | S2AConfig, path: str | Path) -> N:
    """Build a network and load an official or own weights file strictly; returns it in eval mode.

    Raises:
        CheckpointError: names or shapes that do not fit.
    """
    with SkipInit():
        network = cls(config)
    load_strict(network, without_empty(read_weights(path), path), where=path)
    return network.eval()


def without_empty(tensors: Mapping[str, Tensor], where: str | Path = "weights") -> dict[str, Tensor]:
    """Leave out the table of no rows that official S2A files hold.

    Raises:
        CheckpointError: it has rows, so the file is another model's.
    """
    rest = dict(tensors)
    table = rest.pop(EMPTY, None)
    if table is not None and table.numel():
        raise CheckpointError(f"{where}: {EMPTY} has rows; this is not a network of MaskGCT")
    return rest


def target_frames(prompt_samples: int, prompt_phones: int, target_phones: int) -> int:
    """The official length rule: the prompt's speed of speech.

    Args:
        prompt_samples: of the prompt, at 16 kHz.
        prompt_phones, target_phones: how many phones each text has.

    Returns:
        Frames of the target, of 20 ms, rounded down.

    Raises:
        InputError: a prompt without phones.
    """
    if prompt_phones < 1:
        raise InputError("prompt text: has no phones, so its speed is not known; give a duration")
    return int(prompt_samples * target_phones / prompt_phones / SAMPLE_RATE * FRAME_RATE)


def t2s_loss(
    network: T2S,
    batch: MaskedCodes,
    phones: Tensor | None,
    phone_lengths: Tensor | None,
    added: Tensor | None = None,
    official_padding: bool = False,
) -> Mapping[str, Tensor]:
    """Cross entropy of the masked semantic codes.

    Args:
        batch: of :func:`nar_speech.losses.maskgct.mask_semantic`.
        phones, phone_lengths, added, official_padding: see :meth:`T2S.forward`.

    Returns:
        See :func:`nar_speech.losses.masked.masked_cross_entropy`.
    """
    logits = network(
        *(batch.tokens, batch.time, batch.lengths, phones, phone_lengths, added),
        official_padding=official_padding,
    )
    return masked_cross_entropy(logits, batch.targets, batch.masked)


def s2a_loss(network: S2A, batch: MaskedCodes, semantic: Tensor) -> Mapping[str, Tensor]:
    """Cross entropy of the masked acoustic codes of the batch's layer.

    Args:
        batch: of :func:`nar_speech.losses.maskgct.mask_acoustic`.
        semantic: (B, L) int64.
    """
    logits = network(batch.tokens, batch.time, semantic, batch.stage, batch.lengths)
    return masked_cross_entropy(logits, batch.targets, batch.masked)
