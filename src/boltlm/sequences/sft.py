"""Supervised fine-tuning data: one example a training sequence, the loss on completions alone.

Shape suffixes: B sequences of a batch, L sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from boltlm.errors import UserError
from boltlm.seeds import generator
from boltlm.sequences.layouts import TokenIds
from boltlm.sequences.packing import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class SFTExample:
    """Token ids of a prompt and of its completion; the loss is taken on the completion alone."""

    prompt: TokenIds
    completion: TokenIds


class SFTDataset:
    """Examples repeated for some epochs, each in an order that depends on (seed, epoch) alone.

    It has the interface of PackedDataset. Sequences are padded on the right to the length of the
    longest example. Raises UserError where there are no examples.
    """

    def __init__(self, examples: Sequence[SFTExample], epochs: int, seed: int) -> None:
        if not examples:
            raise UserError("there is no example to train on; check the run's `data` and `corpus`")
        self.examples = examples
        self.sequence_length = max(len(e.prompt) + len(e.completion) for e in examples) - 1
        self.order = np.concatenate(
            [
                generator(seed, "examples", epoch).permutation(len(examples))
                for epoch in range(epochs)
            ]
        )

    def __len__(self) -> int:
        """The number of training sequences, over all epochs."""
        return len(self.order)

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs_BL, labels_BL) of a step, int64, as `PackedDataset.batch` returns them.

        The labels of prompts and of padding are IGNORE_INDEX. The last batch may be smaller.
        """
        indices = self.order[step * batch_size : (step + 1) * batch_size]
        inputs_BL = np.zeros((len(indices), self.sequence_length), dtype=np.int64)
        labels_BL = np.full((len(indices), self.sequence_length), IGNORE_INDEX, dtype=np.int64)
        for row, index in enumerate(indices):
            example = self.examples[index]
            ids = np.concatenate([np.asarray(example.prompt), np.asarray(example.completion)])
            inputs_BL[row, : len(ids) - 1] = ids[:-1]
            labels_BL[row, len(example.prompt) - 1 : len(ids) - 1] = example.completion
        return inputs_BL, labels_BL

    def num_target_tokens(self, first_step: int, batch_size: int) -> int:
        """How many tokens the loss is taken on from a step to the end."""
        indices = self.order[first_step * batch_size :]
        return sum(len(self.examples[index].completion) for index in indices)
