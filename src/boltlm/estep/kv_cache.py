"""Batched decoding from shared prompts: batches of similar length, prefill, and a key–value cache
whose rows can be copied.

Shapes: B batch rows, L positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from boltlm.sequences.layouts import TokenIds

SPARE_TOKENS = 32  # positions that a cache layer allocates beyond those in use


class PreallocatedCacheLayer(DynamicLayer):
    """A cache layer with spare capacity: a quarter more rows than in use, and SPARE_TOKENS more
    positions. A decoding step then writes the new keys and values only, where DynamicLayer copies
    all of the previous ones."""

    buffers: list[torch.Tensor] | None = None  # `keys` and `values` are views of these

    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _resize(self, rows: int, length: int) -> None:
        """Extend `keys` and `values` to (rows, length); the new part is uninitialized."""
        if self.buffers is None or any(
            buffer.shape[0] < rows or buffer.shape[2] < length for buffer in self.buffers
        ):
            self.buffers = []
            for states in self._states():
                shape = (rows + rows // 4, states.shape[1], length + SPARE_TOKENS, states.shape[3])
                self.buffers.append(states.new_empty(shape))
                self.buffers[-1][: states.shape[0], :, : states.shape[2]] = states
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self.buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past_length = self.get_seq_length()
        if past_length == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        self._resize(len(key_states), past_length + key_states.shape[2])
        for states, new_states in zip(self._states(), (key_states, value_states), strict=True):
            states[:, :, past_length:] = new_states
        return self._states()

    def append(self, parents: torch.Tensor) -> None:
        """Append copies of the rows `parents` to the batch."""
        rows = len(self._states()[0])
        self._resize(rows + len(parents), self.get_seq_length())
        for states in self._states():
            states[rows:] = states[parents]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.buffers = None


def batch_by_length(
    lengths: Sequence[int], copies: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Indices in batches of similar length. (Sum of `copies`) × (maximum length) is at most
    `batch_tokens` in each batch, unless a single item exceeds it."""
    batches: list[list[int]] = []
    rows = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (rows + copies[index]) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
            rows += copies[index]
        else:
            batches.append([index])
            rows = copies[index]
    return batches


def prefill(
    model: PreTrainedModel, prompts: Sequence[TokenIds], layer: type[DynamicLayer]
) -> tuple[torch.Tensor, Cache, torch.Tensor]:
    """Run left-padded prompts through the model once.

    Returns the logits of the last position (B, V), the key–value cache, and the attention mask
    (B, L). `layer`: class of the cache's layers; PreallocatedCacheLayer if many decoding steps
    follow, DynamicLayer if one forward pass does.
    """
    device = model.device
    max_length = max(map(len, prompts))
    ids_BL = torch.zeros(len(prompts), max_length, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, max_length - len(prompt) :] = torch.as_tensor(prompt)
        mask_BL[row, max_length - len(prompt) :] = 1
    ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
    cache = Cache(layer_class_to_replicate=layer)
    out: Any = model(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        position_ids=(mask_BL.cumsum(1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1], cache, mask_BL
