"""Documents that consist of a question and its answer, and where the answer begins."""

from boltlm.corpus.chunks import split_sentences

# The words with which the answers of benchmarks begin, in documents and in few-shot prompts; where
# a text has several of them the first one counts.
ANSWER_CUES = ("Final Answer:", "The answer is")


def split_answer(text: str, cue: str) -> tuple[str, str]:
    """A text up to the last occurrence of `cue`, and from there on. An empty cue: the answer is the
    last sentence. A part that the text does not have is empty."""
    if cue:
        question, found, answer = text.rpartition(cue)
        return question, f"{found}{answer}"
    *sentences, answer = split_sentences(text) or [""]
    return "".join(sentences), answer


def find_answer_cue(text: str) -> str:
    """The cue of ANSWER_CUES with which the answer of a text begins; empty where it has none."""
    return next((cue for cue in ANSWER_CUES if cue in text), "")
