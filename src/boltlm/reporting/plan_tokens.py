"""How many tokens each part of an experiment has, from its params alone.

Sizes of documents, chunks and latents are those of the section `plan`; tokens follow the formats of
docs/method.md, 3, and FLOPs its section 7.3. Every chunk is taken to have a latent of that length.
"""

import math

from boltlm.evaluation.task_spec import TaskSpec
from boltlm.reporting.plan_config import PlanSettings
from boltlm.teachers.model_config import TeacherConfig
from boltlm.training.config import FLOP_MATCHED_KINDS, ModelEntry

# Special tokens of a chunk with a latent: SoL Prior EoL in prior mode, SoL EoL SoL Post EoL in
# posterior mode, of which a fair coin chooses one.
CHUNK_MARKS = 4
PROMPT_MARKS = 8  # of the two prompts of the E-step: BOS SoL EoL SoL Post, and BOS SoL Prior
# Questions of the public test sets; MMLU-STEM: its subjects of science and mathematics.
TEST_QUESTIONS = {"gsm8k": 1319, "math": 5000, "mmlu_stem": 3153}


class TokenCounts:
    """Counts tokens; `flops_per_token` is None where the size of the model is not known."""

    def __init__(self, settings: PlanSettings) -> None:
        self.settings, size = settings, settings.model_size
        length = settings.sequences.sequence_length
        self.flops_per_token = size.flops_per_token(length) if size else None

    def document_tokens(self, corpus: str) -> int:
        """Raw tokens of a document of a corpus."""
        return self.settings.plan.document_tokens[corpus]

    def raw_tokens(self, corpus: str) -> int:
        """Raw tokens of a corpus."""
        return self.settings.corpora[corpus].documents * self.document_tokens(corpus)

    def chunks(self, corpus: str) -> int:
        """Chunks of a corpus; a document has at least one."""
        per_document = max(1.0, self.document_tokens(corpus) / self.settings.plan.chunk_tokens)
        return round(self.settings.corpora[corpus].documents * per_document)

    def context_tokens(self, corpus: str) -> float:
        """Tokens of the context C of a chunk, on average over the chunks of a document."""
        per_document = max(1, round(self.document_tokens(corpus) / self.chunk_tokens(corpus)))
        earlier = (min(i, self.settings.context_chunks) for i in range(per_document))
        return sum(earlier) / per_document * self.chunk_tokens(corpus)

    def epoch_tokens(self, model: ModelEntry, sequence_format: str | None = None) -> float:
        """Tokens of an epoch of `data` in a format, the model's own by default, without what is
        mixed with it."""
        corpus, latent = model.corpus, self.settings.plan.latent_tokens
        documents = self.settings.corpora[corpus].documents
        chunks, raw = self.chunks(corpus), self.raw_tokens(corpus)
        match sequence_format or model.format:
            case "raw":
                return raw + 2 * documents
            case "mixed":
                return raw + chunks * (latent + 4)
            case "paraphrase":
                return self._paraphrase_tokens(model)
        if self.settings.sequences.layout == "document":
            return raw + chunks * (CHUNK_MARKS + latent) + 2 * documents
        rows = chunks * (1 + self.context_tokens(corpus) + CHUNK_MARKS + latent) + raw
        return rows * (self._num_samples(model) if model.draws == "weighted" else 1) + documents

    def training_tokens(self, name: str) -> int:
        """Tokens of the training stream of an entry of `models`."""
        model = self.settings.models[name]
        budget = model.budget
        if budget.kind == "tokens":
            return budget.amount
        if budget.kind == "steps":
            return self._step_tokens(model) * budget.amount
        matched = budget.kind in FLOP_MATCHED_KINDS
        tokens = budget.amount * self.epoch_tokens(model, "latent" if matched else None)
        if budget.kind == "flop_matched_history" and self.flops_per_token:
            history = self.history(f"latents/{model.data.partition('/')[2]}")
            tokens += sum(history.values()) / self.flops_per_token
        if model.mix_raw and not matched:
            share = model.mix_raw / (1 - model.mix_raw)
            if self.settings.sequences.mix_unit == "tokens":
                tokens /= 1 - model.mix_raw
            else:
                documents = self.settings.corpora[model.corpus].documents * budget.amount
                tokens += share * documents * (self.document_tokens(model.mix_corpus) + 2)
        return round(tokens)

    def history(self, artifact: str) -> dict[str, float]:
        """The FLOPs of each artifact that a model or latents are made from, itself included, by
        name (docs/method.md, 7.3). The FLOPs per token must be known."""
        assert self.flops_per_token is not None
        folder, _, name = artifact.partition("/")
        if folder == "latents":
            own = self.estep_tokens(name) * self.flops_per_token / 3
            return {**self.history(f"models/{self.settings.latents[name].model}"), artifact: own}
        if folder == "teacher":
            written = self.latent_tokens(self.settings.teachers[name].corpus)
            return {artifact: written * self.flops_per_token / 3}
        if folder != "models" or name == "base":
            return {}
        model = self.settings.models[name]
        data = {} if model.format == "raw" else self.history(model.data)
        own = self.training_tokens(name) * self.flops_per_token
        return {**self.history(f"models/{model.parent}"), **data, artifact: own}

    def steps(self, name: str) -> int:
        """Steps of the training of an entry of `models`."""
        model = self.settings.models[name]
        return math.ceil((self.training_tokens(name) - 1) / self._step_tokens(model))

    def estep_tokens(self, name: str) -> float:
        """Tokens that an entry of `latents` runs forward, eq. (15)."""
        entry = self.settings.latents[name]
        k_samples = entry.k_samples or self.settings.k_samples
        return self.chunks(entry.corpus) * self._chunk_forward_tokens(entry.corpus, k_samples)

    def evaluation_tokens(
        self, name: str, *, likelihood: bool = True, limit: int | None = None
    ) -> float:
        """Tokens that an evaluation runs forward: bounds or likelihoods on the held-out corpora,
        and answers of full length to the questions, whose prompts are not counted. `limit`:
        documents of each held-out corpus."""
        evaluate = self.settings.evaluate
        has_latents = name != "base" and self.settings.models[name].format == "latent"
        tokens = 0.0
        for corpus in (evaluate.corpus, *evaluate.extra_corpora) if likelihood else ():
            documents = self.settings.corpora[corpus].documents
            part = min(limit or documents, documents) / documents
            if has_latents:
                k_samples = max(evaluate.k_samples)
                forward = self._chunk_forward_tokens(corpus, k_samples)
                tokens += part * self.chunks(corpus) * forward
            tokens += part * self.raw_tokens(corpus)
        if (large := evaluate.large_k) and has_latents and likelihood:
            part = large.documents / self.settings.corpora[evaluate.corpus].documents
            forward = self._chunk_forward_tokens(evaluate.corpus, large.k_samples)
            tokens += min(1.0, part) * self.chunks(evaluate.corpus) * forward
        for spec in map(TaskSpec.parse, evaluate.tasks):
            if has_latents or spec.space != "latent":
                cues = len(evaluate.cues) if spec.space == "cot" else 1
                tokens += self.questions(spec.task) * cues * self.answer_tokens()
        return tokens

    def questions(self, task: str) -> int:
        """Questions of a task that are asked."""
        count = TEST_QUESTIONS.get(task, self.settings.questions.count)
        return min(count, self.settings.evaluate.limit or count)

    def answer_tokens(self) -> int:
        """The most tokens of a thought and the answer after it."""
        return self.settings.evaluate.max_thought_tokens + self.settings.evaluate.max_answer_tokens

    def chunk_tokens(self, corpus: str) -> float:
        """Raw tokens of a chunk, which is no longer than its document."""
        return min(self.settings.plan.chunk_tokens, self.document_tokens(corpus))

    def latent_tokens(self, corpus: str) -> int:
        """Tokens of one latent for each chunk of a corpus."""
        return self.chunks(corpus) * self.settings.plan.latent_tokens

    def _chunk_forward_tokens(self, corpus: str, k_samples: int) -> float:
        """The tokens of a chunk in eq. (15)."""
        text, latent = self.chunk_tokens(corpus), self.settings.plan.latent_tokens + 1
        prompts = 2 * self.context_tokens(corpus) + text + PROMPT_MARKS
        return prompts + k_samples * (2 * latent + text)

    def _paraphrase_tokens(self, model: ModelEntry) -> float:
        """Tokens of all paraphrases: each is expected to be as long as the teacher's settings say,
        or as its document."""
        teacher = self.settings.teachers[model.data.partition("/")[2]]
        assert isinstance(teacher, TeacherConfig)
        length = getattr(teacher, "expected_output_tokens", self.document_tokens(teacher.corpus))
        documents = self.settings.corpora[teacher.corpus].documents
        return documents * teacher.paraphrases * (length + 2)

    def _num_samples(self, model: ModelEntry) -> int:
        entry = self.settings.latents[model.data.partition("/")[2]]
        return entry.k_samples or self.settings.k_samples

    def _step_tokens(self, model: ModelEntry) -> int:
        return model.train.batch_size * self.settings.sequences.sequence_length
