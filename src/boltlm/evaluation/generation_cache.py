"""A cache of generated answers, so that no prompt is answered twice."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from boltlm.progress import Progress
from boltlm.seeds import generator

BATCHES_PER_WRITE = 4  # batches that are answered between two writes to the cache file


class CachedLM:
    """A model for lm-eval whose answers are appended to a JSON Lines file as they are generated.

    An interrupted evaluation resumes with the first unanswered slice of requests, and the model
    itself is loaded by `load_lm` only when an answer is missing. A request that occurs several
    times is sampled as often. `forbidden` lists the token ids that must not be generated;
    `batch_size` is the number of prompts per batch, and `label` names the progress display.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        load_lm: Callable[[], Any],
        path: Path,
        *,
        label: str,
        seed: int,
        batch_size: int,
        forbidden: tuple[int, ...],
    ) -> None:
        self.load_lm, self.path, self.label = load_lm, path, label
        self.seed, self.forbidden = seed, forbidden
        self.slice_size = BATCHES_PER_WRITE * batch_size
        self.answers: dict[str, str] = {}
        if path.is_file():
            for line in path.read_text("utf-8").splitlines():
                try:
                    self.answers |= dict(json.loads(line))
                except ValueError:
                    continue  # an incomplete line, left by an interrupted run

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """The answers to lm-eval's requests, in their order."""
        keys = _request_keys(requests)
        # An empty prompt stands for a question that does not fit into the context window.
        self.answers |= {
            key: "" for key, request in zip(keys, requests, strict=True) if not request.args[0]
        }
        missing = [
            (key, request)
            for key, request in zip(keys, requests, strict=True)
            if key not in self.answers
        ]
        # Prompts of similar length share a slice; the longest show at once whether memory suffices.
        missing.sort(key=lambda pair: -len(pair[1].args[0]))
        if len(missing) < len(keys):
            cached = len(keys) - len(missing)
            print(f"{self.label}: {cached} of {len(keys)} answers found in {self.path}")
        if missing:
            self._generate(missing)
        return [self.answers[key] for key in keys]

    def _generate(self, missing: Sequence[tuple[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        model = self.load_lm()
        model.forbidden = self.forbidden
        progress = Progress(what=self.label, total=len(missing), unit="answers")
        with self.path.open("a", encoding="utf-8") as file, progress:
            file.write("\n")  # ends a line that an interrupted run may have left incomplete
            for start in range(0, len(missing), self.slice_size):
                batch = missing[start : start + self.slice_size]
                # Seeded by the slice's first request: a resumed run draws the same answers.
                model.seed = generator(self.seed, batch[0][0]).integers(2**31).item()
                answers = model.generate_until([request for _, request in batch], disable_tqdm=True)
                new = dict(zip([key for key, _ in batch], answers, strict=True))
                self.answers |= new
                file.write(json.dumps(new) + "\n")  # one line, so that a slice is all or nothing
                file.flush()
                progress.advance(len(batch))


def _request_keys(requests: Sequence[Any]) -> list[str]:
    """A digest of each request's prompt, its generation settings, and how many times the prompt has
    occurred before."""
    occurrences: Counter[str] = Counter()
    keys: list[str] = []
    for request in requests:
        prompt, generation_settings = request.args[0], request.args[1]
        text = json.dumps([prompt, generation_settings, occurrences[prompt]])
        occurrences[prompt] += 1
        keys.append(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
    return keys
