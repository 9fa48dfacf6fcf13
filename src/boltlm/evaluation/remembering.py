"""Answers of a model that are never asked for twice."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from boltlm.progress import Progress
from boltlm.seeds import generator

SLICE = 4  # batches that are answered between two visits to the disk


class Remembering:
    """For lm-eval a model, whose answers are kept in a file, slice by slice: a killed evaluation
    goes on where it was, and what is known needs no model. The same request again is another draw.
    `load`: gives the model that answers; `forbidden`: ids that it must not draw."""

    rank, world_size = 0, 1

    def __init__(
        self,
        load: Callable[[], Any],
        path: Path,
        *,
        what: str,
        seed: int,
        batch_size: int,
        forbidden: tuple[int, ...],
    ) -> None:
        self.load, self.path, self.what = load, path, what
        self.seed, self.slice, self.forbidden = seed, SLICE * batch_size, forbidden
        self.known: dict[str, str] = {}
        if path.is_file():
            for line in path.read_text("utf-8").splitlines():
                try:
                    self.known |= dict(json.loads(line))
                except ValueError:
                    continue  # the line that a killed run was writing

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        seen: Counter[str] = Counter()
        keys: list[str] = []
        for request in requests:
            text = json.dumps([request.args[0], request.args[1], seen[request.args[0]]])
            seen[request.args[0]] += 1
            keys.append(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
        # A prompt for which the window has no room is empty, and so is its answer.
        self.known |= {k: "" for k, r in zip(keys, requests, strict=True) if not r.args[0]}
        left = [(k, r) for k, r in zip(keys, requests, strict=True) if k not in self.known]
        left.sort(key=lambda pair: -len(pair[1].args[0]))
        if len(left) < len(keys):
            print(f"{self.what}: {len(keys) - len(left)} of {len(keys)} answers known")
        if left:
            self._answer(left)
        return [self.known[key] for key in keys]

    def _answer(self, left: Sequence[tuple[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        model = self.load()
        model.forbidden = self.forbidden
        progress = Progress(what=self.what, total=len(left), unit="answers")
        with self.path.open("a", encoding="utf-8") as file, progress:
            file.write("\n")  # behind a line that may be torn
            for start in range(0, len(left), self.slice):
                batch = left[start : start + self.slice]
                model.seed = generator(self.seed, batch[0][0]).integers(2**31).item()
                answers = model.generate_until([r for _, r in batch], disable_tqdm=True)
                keys = [key for key, _ in batch]
                found = dict(zip(keys, answers, strict=True))
                self.known |= found
                file.write(json.dumps(found) + "\n")  # a line a slice: all of it or nothing
                file.flush()
                progress.advance(len(batch))
