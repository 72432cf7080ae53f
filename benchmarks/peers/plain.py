"""The demo's models as plain functions of tensors around their own modules, for tools that trace a model.

    model = plain(asked)
    logits = model(model.first(tokens_or_images))

Modules have the names that the layers have in the model itself. What no plan may touch (embedding, head,
classifier) is no module here: `first` is what comes before the traced part, the rest are constants.
"""

from __future__ import annotations

from typing import Any

import torch
from asked import Asked
from torch import Tensor, nn


def plain(asked: Asked) -> nn.Module:
    """The asked model, rewritten."""
    model = asked.model()
    if asked.kind == "cnn":
        return PlainResNet(model).eval()
    return PlainLlama(model, asked.samples["input_ids"].shape[1]).eval()


class PlainResNet(nn.Module):
    """ResNetForImageClassification on pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.resnet = model.resnet
        head = model.classifier[1]
        self.register_buffer("head", head.weight.detach().T.contiguous())
        self.register_buffer("offset", head.bias.detach())

    def first(self, pixels: Tensor) -> Tensor:
        """The pixels themselves."""
        return pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, classes)."""
        hidden = self.resnet.embedder.pooler(self.resnet.embedder.embedder(pixels))
        for stage in self.resnet.encoder.stages:
            hidden = stage(hidden)
        pooled = hidden.mean(dim=(2, 3))
        return torch.matmul(pooled, self.head) + self.offset


class PlainLlama(nn.Module):
    """LlamaForCausalLM on the embeddings of whole sequences of one length, without cache or padding."""

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.config = model.config
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(PlainBlock(block, model.config) for block in model.model.layers)
        self.model.norm = PlainNorm(model.model.norm)
        # a tuple hides the table from the tracer: it is no module here
        self.embedding = (model.model.embed_tokens,)
        self.register_buffer("head", model.lm_head.weight.detach().T.contiguous())
        positions = torch.arange(length)[None]
        cosine, sine = model.model.rotary_emb(model.model.embed_tokens.weight, positions)
        self.register_buffer("cosine", cosine[:, None].detach())
        self.register_buffer("sine", sine[:, None].detach())
        self.register_buffer("mask", torch.full((length, length), -1e9).triu(1))

    def first(self, tokens: Tensor) -> Tensor:
        """Embeddings (N, length, width)."""
        return self.embedding[0](tokens).detach()

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (N, length, vocabulary)."""
        for block in self.model.layers:
            hidden = block(hidden, self.cosine, self.sine, self.mask)
        return torch.matmul(self.model.norm(hidden), self.head)


class PlainBlock(nn.Module):
    """One decoder block."""

    def __init__(self, block: nn.Module, config: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = PlainAttention(block.self_attn, config), block.mlp
        self.input_layernorm = PlainNorm(block.input_layernorm)
        self.post_attention_layernorm = PlainNorm(block.post_attention_layernorm)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cosine, sine, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class PlainAttention(nn.Module):
    """Causal attention of grouped queries with rotary positions."""

    def __init__(self, attention: nn.Module, config: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.width = attention.head_dim
        self.heads, self.pairs = config.num_attention_heads, config.num_key_value_heads

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor) -> Tensor:
        length, repeats = mask.shape[-1], self.heads // self.pairs
        query = self.split(self.q_proj(hidden), self.heads, length)
        key = self.split(self.k_proj(hidden), self.pairs, length)
        value = self.split(self.v_proj(hidden), self.pairs, length)
        query, key = self.rotated(query, cosine, sine), self.rotated(key, cosine, sine)
        key, value = self.repeated(key, repeats, length), self.repeated(value, repeats, length)
        weights = torch.matmul(query, key.transpose(2, 3)) * self.width**-0.5 + mask
        mixed = torch.matmul(torch.softmax(weights, dim=-1), value)
        return self.o_proj(mixed.transpose(1, 2).reshape(-1, length, self.heads * self.width))

    def split(self, flat: Tensor, heads: int, length: int) -> Tensor:
        """(N, length, heads * width) -> (N, heads, length, width)."""
        return flat.reshape(-1, length, heads, self.width).transpose(1, 2)

    def rotated(self, rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Each half of the width turned by its position's angle."""
        first, second = torch.chunk(rows, 2, dim=-1)
        return rows * cosine + torch.cat((second * -1.0, first), dim=-1) * sine

    def repeated(self, rows: Tensor, repeats: int, length: int) -> Tensor:
        """(N, pairs, length, width) -> (N, pairs * repeats, length, width), each head next to its copies."""
        stacked = torch.stack([rows] * repeats, dim=2)
        return stacked.reshape(-1, self.heads, length, self.width)


class PlainNorm(nn.Module):
    """Root mean square normalization."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.register_buffer("scale", norm.weight.detach())
        self.epsilon = norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        spread = torch.mean(hidden * hidden, dim=-1, keepdim=True)
        return hidden * torch.rsqrt(spread + self.epsilon) * self.scale
