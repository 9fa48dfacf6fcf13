"""Prompts and their completions become training rows, one a row, with the loss on completions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from boltlm.errors import UserError
from boltlm.seeds import generator
from boltlm.sequences.layouts import Ids
from boltlm.sequences.packing import IGNORED


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids; the loss is taken on those of the completion alone."""

    prompt: Ids
    completion: Ids


class Examples:
    """So many epochs of examples, each epoch in an order of its own from (seed, epoch); what
    `train` takes in the place of packed rows. Padded on the right to the longest example."""

    def __init__(self, examples: Sequence[Example], epochs: int, seed: int) -> None:
        if not examples:
            raise UserError("there is no example to train on")
        self.examples = examples
        self.length = max(len(one.prompt) + len(one.completion) for one in examples) - 1
        self.order = np.concatenate(
            [
                generator(seed, "examples", epoch).permutation(len(examples))
                for epoch in range(epochs)
            ]
        )

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, step: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs_BL, labels_BL), int64, as of packed rows; prompts have the label IGNORED."""
        rows = self.order[step * count : (step + 1) * count]
        inputs = np.zeros((len(rows), self.length), dtype=np.int64)
        labels = np.full((len(rows), self.length), IGNORED, dtype=np.int64)
        for place, row in enumerate(rows):
            one = self.examples[row]
            ids = np.concatenate([np.asarray(one.prompt), np.asarray(one.completion)])
            inputs[place, : len(ids) - 1] = ids[:-1]
            labels[place, len(one.prompt) - 1 : len(ids) - 1] = one.completion
        return inputs, labels

    def predicted(self, first_step: int, count: int) -> int:
        """How many tokens are predicted from a step on."""
        return sum(len(self.examples[row].completion) for row in self.order[first_step * count :])
