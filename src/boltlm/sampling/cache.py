"""Key–value caches that begin with a prompt and branch: batches, prefill, rows that split.

Shapes: B rows, L positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from boltlm.sequences.layouts import Ids

ROOM = 32  # tokens kept free behind those that are there


class RoomyLayer(DynamicLayer):
    """Keeps room behind its rows (a quarter) and their tokens (ROOM), so that a step writes what
    is new instead of copying all that was there before it."""

    rooms: list[torch.Tensor] | None = None  # `keys` and `values` begin these

    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _grow(self, rows: int, length: int) -> None:
        """Make `keys` and `values` reach to (rows, length); what is new is not filled."""
        if self.rooms is None or any(r.shape[0] < rows or r.shape[2] < length for r in self.rooms):
            self.rooms = []
            for old in self._states():
                shape = (rows + rows // 4, old.shape[1], length + ROOM, old.shape[3])
                self.rooms.append(old.new_empty(shape))
                self.rooms[-1][: old.shape[0], :, : old.shape[2]] = old
        self.keys, self.values = (room[:rows, :, :length] for room in self.rooms)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.get_seq_length()
        if before == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        self._grow(len(key_states), before + key_states.shape[2])
        for states, new in zip(self._states(), (key_states, value_states), strict=True):
            states[:, :, before:] = new
        return self._states()

    def append(self, parents: torch.Tensor) -> None:
        """Put copies of some rows behind the rows."""
        rows = len(self._states()[0])
        self._grow(rows + len(parents), self.get_seq_length())
        for states in self._states():
            states[rows:] = states[parents]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.rooms = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.rooms = None


def length_batches(
    lengths: Sequence[int], copies: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Indices in batches of similar length: (sum of copies) × longest ≤ `batch_tokens`, or a
    single one where even that is more."""
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
    model: PreTrainedModel, prompts: Sequence[Ids], layer: type[DynamicLayer]
) -> tuple[torch.Tensor, Cache, torch.Tensor]:
    """Run left-padded prompts once; return (last logits, key–value cache, attention mask). The
    cache's layers: RoomyLayer for many steps, DynamicLayer for one."""
    device = model.device
    longest = max(map(len, prompts))
    ids_BL = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
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
