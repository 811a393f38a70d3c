"""A small causal language model whose mixers can be exchanged, and a linear mixer."""

import torch
import torch.nn.functional as F
from stdlib_text import Text, windows
from torch import Tensor, nn


class Mixer(nn.Module):
    """What any mixer has: queries, keys and values by heads, and an output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.count, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def heads(self, x: Tensor) -> list[Tensor]:
        split = (part.unflatten(-1, (self.count, -1)) for part in self.qkv(x).chunk(3, -1))
        return [part.transpose(1, 2) for part in split]  # [B, heads, L, width of a head]

    def joined(self, heads: Tensor) -> Tensor:
        return self.out(heads.transpose(1, 2).flatten(2))


class Attention(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(F.scaled_dot_product_attention(*self.heads(x), is_causal=True))


class LinearAttention(Mixer):
    """Attention without a map: a state of one size, to which each token adds its key and value.

    Token i gets Σ_{j≤i} (φ(q_i)·φ(k_j)) v_j / Σ_{j≤i} φ(q_i)·φ(k_j), where φ is learned (Hedgehog,
    Zhang et al. 2024, arXiv 2402.04347): the softmax of x W, and that of −x W.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.phi = nn.Linear(width // heads, width // heads, bias=False)
        nn.init.eye_(self.phi.weight)

    def features(self, x: Tensor) -> Tensor:
        z = self.phi(x)
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = self.features(q), self.features(k)
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last column: the denominator
        states = (k[..., :, None] * v[..., None, :]).cumsum(2)
        found = (q[..., None, :] @ states)[..., 0, :]
        return self.joined(found[..., :-1] / found[..., -1:])


def matrix(module: LinearAttention, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """The port of a map ``[B, heads, L, L]`` that linear attention stands for and never makes."""
    q, k, _ = module.heads(args[0])
    scores = (module.features(q) @ module.features(k).mT).tril()
    return scores / scores.sum(-1, keepdim=True)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Ids ``[B, L]`` to logits ``[B, L, vocabulary]``."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.05)
        nn.init.normal_(self.places.weight, std=0.05)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean over tokens of −log p(next token), in nats."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: nn.Module, text: Text, length: int, count: int = 256) -> float:
    """Nats per token on files that nobody trained on."""
    model.eval()
    found = [next_token_loss(model, ids) for ids in windows(text.heldout, count, length).split(32)]
    model.train()
    return torch.stack(found).mean().item()
