"""Plans taken from the text itself, and the stage that writes them."""

from boltlm.records import Chunk, Document
from boltlm.teachers.extracted import PhraseExtractor

TEXTS = [
    "# Prime numbers\n\nA natural number with two divisors is called a prime number. ",
    "Euler's identity says $e^{i\\pi} = -1$ for the complex exponential function. ",
    "Zebras run. Zebras graze with zebras. ",
    "1 2 3. ",
]


class Characters:
    """An encoder with a token for each character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def latents(limit: int, phrases: int = 2) -> list[str | None]:
    chunks = [Chunk(doc_id="d", chunk=i, text=t, tokens=(1,)) for i, t in enumerate(TEXTS)]
    document = Document(doc_id="d", text="".join(TEXTS), source="test")
    found, reason = PhraseExtractor(phrases, Characters(), limit).latents(document, chunks)
    assert reason is None
    return found


def test_a_plan_has_phrases_heading_definition_and_formula_of_its_chunk() -> None:
    """Nothing else, and nothing where there is nothing."""
    prime, euler, zebras, numbers = latents(200)
    assert prime is not None
    assert "Topic: Prime numbers." in prime
    assert "Defines: prime number." in prime
    assert euler is not None
    assert "Formula: e^{i\\pi} = -1." in euler
    assert zebras is not None
    assert zebras.startswith("Terms: zebras")
    assert numbers is None


def test_a_plan_is_no_longer_than_the_limit_and_the_same_every_time() -> None:
    """Parts that do not fit are left out whole."""
    assert latents(200) == latents(200)
    short = latents(40)
    assert all(latent is None or len(latent) <= 40 for latent in short)
    assert short[0] is not None
    assert short[0] in (latents(200)[0] or "")


def test_phrases_share_no_word() -> None:
    """So that a plan does not say the same twice."""
    for latent in latents(200, phrases=5):
        terms = (latent or "").partition("Terms: ")[2].partition(".")[0].split(", ")
        words = [word for term in terms for word in term.split()]
        assert len(words) == len(set(words))
