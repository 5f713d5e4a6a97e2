"""Decoding steps of a T5 recommender for `gr.beam`: the encoder once per user, its keys and values shared by all beams.

The decoder is run on the transformers model's own weights. Beams are query positions of one user, not rows of a batch, so
cross-attention reads each user's keys once, whatever the number of beams; only the few positions of a beam's own prefix are kept
per beam and reordered. The encoder runs on users of like length together: most histories are short, and padded to the longest
of a batch more than half of its work would be on padding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import T5ForConditionalGeneration

from gr.beam import length_groups


class T5Stepper:
    """`gr.beam.Stepper` for a T5 model in eval mode; ``input_ids``, ``attention_mask``: (users, tokens), padded on the right."""

    def __init__(self, model: T5ForConditionalGeneration, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.model, c = model, model.config
        self.heads, self.d_kv = c.num_heads, c.d_kv
        self.blocks = model.decoder.block
        self.cross = self._cross_keys(input_ids, attention_mask)
        self.mask = (attention_mask == 0)[:, None, None, :]
        self.past: list[tuple[Tensor, Tensor]] = []
        self.position = 0

    def start(self) -> Tensor:
        users = self.mask.shape[0]
        tokens = torch.full((users, 1), self.model.config.decoder_start_token_id, device=self.mask.device)
        return self._step(tokens)[:, 0]

    def advance(self, parents: Tensor, tokens: Tensor) -> Tensor:
        users = torch.arange(len(parents), device=parents.device)[:, None]
        self.past = [(k[users, parents], v[users, parents]) for k, v in self.past]
        return self._step(tokens)

    def _cross_keys(self, input_ids: Tensor, attention_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per decoder layer the keys and values (users, heads, tokens, d_kv) of the encoded histories, 0 at padding."""
        lengths = attention_mask.sum(dim=1)
        groups = length_groups(lengths)
        projections = [p for b in self.blocks for p in (b.layer[1].EncDecAttention.k, b.layer[1].EncDecAttention.v)]
        parts: list[list[Tensor]] = []
        for users in groups:
            longest = max(1, int(lengths[users].max()))
            inputs = {"input_ids": input_ids[users, :longest], "attention_mask": attention_mask[users, :longest]}
            hidden = self.model.encoder(**inputs).last_hidden_state
            more = input_ids.shape[1] - longest
            parts.append([pad(self._split(projection(hidden)), (0, 0, 0, more)) for projection in projections])
        back = torch.cat(groups).argsort()
        joined = [torch.cat(part)[back] for part in zip(*parts, strict=True)]
        return list(zip(joined[::2], joined[1::2], strict=True))

    def _split(self, x: Tensor) -> Tensor:
        """(users, n, heads x d_kv) -> (users, heads, n, d_kv)."""
        return x.view(*x.shape[:2], self.heads, self.d_kv).transpose(1, 2)

    def _step(self, tokens: Tensor) -> Tensor:
        """(users, beams) last tokens -> (users, beams, vocab) log-probabilities."""
        x = self.model.decoder.embed_tokens(tokens)
        bias = self._position_bias()
        past: list[tuple[Tensor, Tensor]] = []
        for i, block in enumerate(self.blocks):
            own, across, feed_forward = block.layer
            x = x + self._self_attention(own.SelfAttention, own.layer_norm(x), bias, i, past)
            x = x + self._cross_attention(across.EncDecAttention, across.layer_norm(x), i)
            x = x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))
        self.past = past
        self.position += 1
        x = self.model.decoder.final_layer_norm(x)
        if self.model.config.tie_word_embeddings:
            x = x * self.model.config.d_model**-0.5
        return torch.log_softmax(self.model.lm_head(x).float(), dim=-1)

    def _position_bias(self) -> Tensor:
        """(heads, 1, positions so far): T5's relative bias of the newest position, held by the first block's attention."""
        attention: Any = self.blocks[0].layer[0].SelfAttention
        distance = torch.arange(self.position + 1, device=self.mask.device) - self.position
        bucket = attention._relative_position_bucket(
            distance,
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias: Tensor = attention.relative_attention_bias(bucket)
        return bias.T[:, None, :]

    def _self_attention(self, attention: Any, x: Tensor, bias: Tensor, layer: int, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        users, beams, _ = x.shape
        shape = (users, beams, self.heads, 1, self.d_kv)
        q, k, v = attention.q(x).view(shape), attention.k(x).view(shape), attention.v(x).view(shape)
        if self.past:
            k, v = torch.cat([self.past[layer][0], k], dim=3), torch.cat([self.past[layer][1], v], dim=3)
        past.append((k, v))
        weights = torch.softmax(q @ k.transpose(3, 4) + bias, dim=-1)
        out: Tensor = attention.o((weights @ v).reshape(users, beams, -1))
        return out

    def _cross_attention(self, attention: Any, x: Tensor, layer: int) -> Tensor:
        k, v = self.cross[layer]
        scores = self._split(attention.q(x)) @ k.transpose(2, 3)
        weights = torch.softmax(scores.masked_fill(self.mask, torch.finfo(scores.dtype).min), dim=-1)
        out: Tensor = attention.o((weights @ v).transpose(1, 2).reshape(*x.shape[:2], -1))
        return out
