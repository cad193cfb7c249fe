"""A variational autoencoder of byte strings: a bidirectional Transformer encodes, a GRU decodes.

The encoder is the text tower of SigLIP as Transformers has it, untrained: a stock model without a causal mask, whose
FFNs pyprune finds by itself. VAE: Kingma and Welling 2014, arXiv 1312.6114; of text, with annealed KL and word dropout:
Bowman et al. 2016, arXiv 1511.06349; free bits: Kingma et al. 2016, arXiv 1606.04934, appendix C.8.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipTextConfig, SiglipTextModel

from pyprune.base.errors import check

BYTES = 256
START, DROPPED = BYTES, BYTES + 1  # what the decoder reads before the first byte, and in the place of a dropped one


@dataclass(frozen=True)
class Sizes:
    """How large the model is.

    Attributes:
        length: bytes of a string.
        hidden: D, of the encoder.
        width: F, neurons of each of its FFNs.
        layers, heads: of the encoder.
        latent: dimensions of z.
        decoder: of the GRU.

    Raises:
        InputError: a size below 1, or a hidden size that is no multiple of the heads.
    """

    length: int = 16
    hidden: int = 64
    width: int = 512
    layers: int = 2
    heads: int = 4
    latent: int = 32
    decoder: int = 96

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check(isinstance(value, int) and value >= 1, name, "be an integer of at least 1", value)
        check(self.hidden % self.heads == 0, "hidden", f"be a multiple of the {self.heads} heads", self.hidden)


@dataclass(frozen=True)
class Loss:
    """What the training loss is, beside the negative ELBO.

    Attributes:
        word_dropout: share of the bytes that the decoder does not see, so that it must ask z; in [0, 1).
        free_bits: nats that each latent dimension may cost, on the mean over a batch, before the loss counts them.

    Raises:
        InputError: a value out of its range.
    """

    word_dropout: float = 0.9
    free_bits: float = 0.1

    def __post_init__(self) -> None:
        check(0 <= self.word_dropout < 1, "word_dropout", "lie in [0, 1)", self.word_dropout)
        check(0 <= self.free_bits < float("inf"), "free_bits", "be non-negative and finite", self.free_bits)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, elementwise: (mean^2 + var - 1 - log var) / 2.

    `expm1` keeps what is left of var - 1 - log var near the prior.

    Source: Kingma and Welling 2014, arXiv 1312.6114, appendix B.
    """
    return (mean.square() + torch.expm1(log_variance) - log_variance) / 2


class Decoder(nn.Module):
    """A GRU that starts from z and reads z again beside every byte."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES + 2, sizes.hidden)
        self.start = nn.Linear(sizes.latent, sizes.decoder)
        self.gru = nn.GRU(sizes.hidden + sizes.latent, sizes.decoder, batch_first=True)
        self.out = nn.Linear(sizes.decoder, BYTES)

    def forward(self, before: Tensor, z: Tensor) -> Tensor:
        """Logits `[B, W, 256]` of each byte, from those before it (`[B, W]`) and z (`[B, latent]`)."""
        beside = z[:, None].expand(-1, before.shape[1], -1)
        hidden, _ = self.gru(torch.cat([self.embedding(before), beside], -1), self.start(z).tanh()[None])
        logits: Tensor = self.out(hidden)
        return logits


class TextVAE(nn.Module):
    """Strings of bytes -> z -> strings of bytes.

    Args:
        sizes: of the parts.
        loss: of training.

    Attributes:
        encoder: a Transformers model; what pyprune prunes. Its head gives mean and log variance of z from the hidden
            state of the last byte: with a mean over all of them, the embeddings alone would carry most of it.
        decoder: what pyprune leaves alone.
    """

    def __init__(self, sizes: Sizes, loss: Loss | None = None) -> None:
        super().__init__()
        self.sizes, self.loss = sizes, loss or Loss()
        config: Any = SiglipTextConfig(
            vocab_size=BYTES,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            max_position_embeddings=sizes.length,
            projection_size=2 * sizes.latent,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.encoder: Any = SiglipTextModel(config)
        self.decoder = Decoder(sizes)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x), `[B, latent]` each, for strings `[B, W]`."""
        mean, log_variance = self.encoder(input_ids=ids).pooler_output.chunk(2, -1)
        return mean, log_variance

    def reconstruction(self, ids: Tensor, z: Tensor, dropout: float = 0.0) -> Tensor:
        """-log p(x | z) in nats, `[B]`: of all bytes of each string.

        Args:
            ids: `[B, W]`.
            z: `[B, latent]`.
            dropout: share of the bytes that the decoder reads as `DROPPED`.
        """
        before = torch.cat([ids.new_full((len(ids), 1), START), ids[:, :-1]], 1)
        if dropout:
            before = before.masked_fill(torch.rand(before.shape) < dropout, DROPPED)
        logits = self.decoder(before, z)
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids).sum(1)

    def training_loss(self, ids: Tensor, kl_weight: float) -> Tensor:
        """Nats a byte, a mean over strings: reconstruction by one sample of z, plus the weighted KL with free bits."""
        mean, log_variance = self.encode(ids)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kl = gaussian_kl(mean, log_variance).mean(0).clamp_min(self.loss.free_bits).sum()
        lost = self.reconstruction(ids, z, self.loss.word_dropout).mean()
        return (lost + kl_weight * kl) / ids.shape[1]
