"""One step of the model over a paged cache: the function that prefill and decode are both traced from.

    (tokens [batch, seq], starts [batch], lengths [batch], page_table [batch, table], cache)
        -> (logits [batch, vocab], next_token [batch], cache)

Row b has `starts[b]` tokens in the cache already and brings `lengths[b]` new ones, right-aligned in `tokens`: the last
column is always the last token of its row, so that the head sees one position a row and needs no gather. What stands to
the left of the new tokens is padding. A row of length 0 is idle. Integers are int32, logits float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION_NAME = "llmir_paged"


@dataclass
class PagedState:
    """What travels through transformers' forward to every attention: the newest cache, and where tokens stand."""

    cache: Tensor
    page_table: Tensor
    positions: Tensor


class Step(nn.Module):
    """The model, called with explicit positions and a paged cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, starts: Tensor, lengths: Tensor, page_table: Tensor, cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store the new tokens, attend, and give the logits of each row's last one; shapes as the module says."""
        seq = tokens.shape[1]
        offsets = _columns(seq) + (lengths[:, None] - seq)
        positions = torch.where(offsets >= 0, starts[:, None] + offsets, -1)
        state = PagedState(cache, page_table, positions)
        logits = self.model(
            input_ids=tokens,
            position_ids=positions.clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
            paged=state,
        ).logits[:, 0]
        return logits, logits.argmax(dim=-1).to(torch.int32), state.cache


def _columns(seq: int) -> Tensor:
    """The numbers of the columns, int32 [seq]; a literal if their number is known, as in a chunk.

    Numbers that the compiler makes itself are of type index. It fuses them into the reductions of attention, for which
    SPIR-V would then need workgroup memory of that type, which it does not have.
    """
    if isinstance(seq, int) and seq > 1:
        return torch.tensor(range(seq), dtype=torch.int32)
    return torch.arange(seq, dtype=torch.int32)


def register_attention() -> str:
    """Make transformers attend through the `llmir` ops.

    Returns:
        The name to put into `config._attn_implementation`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _attend)
    # Causality, padding and windows are the op's business; transformers has no mask to build.
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *_args, **_kwargs: None)
    return ATTENTION_NAME


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged: PagedState,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: query, key and value are [batch, heads, seq, head_dim]."""
    table, positions, layer = paged.page_table, paged.positions, module.layer_idx
    paged.cache = torch.ops.llmir.append_kv(
        paged.cache, key.transpose(1, 2), value.transpose(1, 2), table, positions, layer
    )
    output, paged.cache = torch.ops.llmir.paged_attention(
        query.transpose(1, 2),
        paged.cache,
        table,
        positions,
        layer,
        scaling,
        sliding_window or 0,
        softcap or 0.0,
    )
    return output, None
