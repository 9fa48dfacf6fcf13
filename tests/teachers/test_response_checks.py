"""Which responses are usable: refusals, copies, lengths, and content in parts."""

import pytest

from boltlm.errors import UserError
from boltlm.teachers.response_cache import TeacherResponse
from boltlm.teachers.response_checks import (
    COPY_NGRAM,
    ResponseChecks,
    ResponseChecksConfig,
    copied_fraction,
    read_message,
)

REFUSALS = """\
I'm sorry, but I can't help with that.
I’m sorry, but I can’t assist with that request.
I am sorry, but I cannot provide a response to this passage.
I'm very sorry, but the content you provided goes against my guidelines.
I'm sorry. I can't continue this text.
I'm sorry that I can't be of more help here.
I'm sorry to inform you that I cannot rewrite copyrighted material.
I'm sorry for any confusion, but the passage seems to be cut off.
Sorry, but I can't do that.
Sorry, I can't help with this one.
Sorry I am not able to answer that.
Apologies, but I can't fulfil this request.
Apologies for the confusion, but there is no passage here.
My apologies, but the text is missing.
I apologize, but I am unable to process this document.
I apologise for the inconvenience, but I cannot see any text.
I must apologize: the request is outside what I may do.
I'm afraid I can't help with that.
I am afraid that I cannot comply with this request.
I can't help with that.
I can’t provide the thoughts behind this passage.
I cannot assist with this request.
I cannot fulfill your request because it involves medical advice.
I can not generate content of this kind.
I can't create that content for you.
I cannot directly answer questions about real people.
I simply cannot write this.
I could not process the passage as it appears to be empty.
I cannot in good conscience continue; I cannot write this.
I won't be able to help with this passage.
I will not provide instructions for this.
I won't write the thoughts behind this text.
I'm unable to assist with that.
I’m unable to reproduce copyrighted text.
I am unable to provide the derivation you ask for.
I'm currently unable to access the document.
I'm not able to help with that request.
I am not able to generate this content.
I'm not comfortable writing about this topic.
I do not feel comfortable reconstructing these thoughts.
I don't have access to the earlier text.
I do not have the ability to view images.
I don't have enough information to reconstruct the thoughts.
I'm not allowed to discuss this.
I am not programmed to respond to this.
I must decline this request.
I have to respectfully decline.
I respectfully decline to continue.
As an AI language model, I cannot express opinions.
As an AI, I don't have personal beliefs.
As an AI developed by OpenAI, I am not able to do this.
As a large language model, I have no access to the web.
As a language model trained by a company, my purpose is to help safely.
As an artificial intelligence, I can't feel what the author felt.
I'm an AI assistant and have no thoughts of my own.
I am just an AI, so please consult a doctor.
I am a large language model and cannot know the author.
Unfortunately, I cannot provide that.
Unfortunately, I am unable to complete this task.
Regrettably, I can't assist with this.
Well, I can't help with that.
Thank you for the passage, but I can't reconstruct it.
"I'm sorry, but I can't help with that."
**I'm sorry, but I can't continue.**
It seems you haven't provided a passage.
It looks like you did not include the text.
It appears that the passage is missing.
It seems that your message was empty.
Please provide the passage you want me to work on.
Could you please share the document?
Your request violates our usage policies.
This request cannot be completed.
""".splitlines()

ANSWERS = """\
I cannot be zero since the voltage across the resistor is not.
I can't be negative, because it is the square of an amplitude.
I cannot exceed 5 A, as the fuse would blow.
I can be written as the integral of r squared over the mass.
I is the moment of inertia about the axis of the disk.
I cannot be both injective and of lower rank.
I cannot contain the unit 1, or the ideal would be the whole ring.
I will be twice as large when the resistance is halved.
I could not be larger than the sum of the two intensities.
I do not commute with A unless A is diagonal.
I have to be the identity matrix for this to hold.
I am the narrator of this tale, and I was born in 1832.
I am sorry to have missed the harvest of that year, writes the farmer.
I'm sorry I have not written, begins the first letter.
I am not the first to notice that primes thin out.
I must go down to the sea again is the first line of a poem.
I will not go, said the king, and the messenger left.
I can't sleep, says the narrator, because the wind is loud.
I am unable to walk since the accident, the patient reported.
Sorry is the hardest word, as a song says.
An apology of the king was printed in 1641.
Apologies were common in that time, so the letter begins with one.
Unfortunately, the series does not converge at the end of the interval.
Unfortunately, I is not constant in a real circuit.
As an AI system learns from data, its errors follow the data's errors.
As an aid to memory, the sine comes before the cosine.
As an alternative, one may integrate by parts.
As a language, Latin has six cases.
As a large number of trials is made, the mean settles.
As a model of a language, a Markov chain forgets what is far away.
It seems that the author compares two rates.
It looks like a parabola because the second difference is constant.
It appears in Euclid's Elements as the 47th proposition.
The request for a refund cannot be granted after 30 days.
Please note that 0! is defined to be 1.
Thank you notes are sent within a week of the event.
Well, the sum of the angles is 180 degrees.
Help with homework is the subject of the page.
We cannot provide a closed form, but the limit exists.
One cannot answer this without the law of large numbers.
There is no passage from the lake to the sea.
The text is missing a factor of two in the second line.
The passage rests on the fact that density is mass over volume.
AI systems are trained by gradient descent, which needs derivatives.
""".splitlines()


class Characters:
    """A tokenizer whose tokens are the characters."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def make_checks(
    *,
    max_latent_tokens: int | None = None,
    max_copied_fraction: float | None = None,
    min_tokens: int = 0,
    language: str | None = None,
) -> ResponseChecks:
    config = ResponseChecksConfig(
        max_copied_fraction=max_copied_fraction, min_tokens=min_tokens, language=language
    )
    return ResponseChecks(encoder=Characters(), max_latent_tokens=max_latent_tokens, config=config)


def response(text: str, finish: str = "stop") -> TeacherResponse:
    return TeacherResponse(
        key="k",
        attempt=0,
        text=text,
        finish=finish,
        input_tokens=1,
        output_tokens=1,
        cost_usd=0.0,
        model="m",
    )


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_known_by_its_opening(text: str) -> None:
    """As models write them, with either apostrophe, in quotes or bold type."""
    assert make_checks().unusable_reason(response(text), "source") == "refused"


@pytest.mark.parametrize("text", ANSWERS)
def test_what_only_begins_like_a_refusal_is_used(text: str) -> None:
    """Currents called I, letters and stories in the first person, texts about AI."""
    assert make_checks().unusable_reason(response(text), "source") is None


def test_the_table_of_openings_is_large() -> None:
    """Each opening is in it once."""
    openings = [*REFUSALS, *ANSWERS]
    assert len(set(openings)) == len(openings) >= 100


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("A fact.", "stop", None),
        ("A fact.", "eos_token", None),
        ("A fact.", "length", "truncated"),
        ("A fact.", "content_filter", "refused"),
        ("A fact.", "abort", "incomplete"),
        (" \n", "stop", "empty"),
        ("A <|prior|> fact.", "stop", "special_token"),
    ],
)
def test_endings_and_contents(text: str, finish: str, reason: str | None) -> None:
    """A response is used only where the model itself ended it and it is a text."""
    assert make_checks().unusable_reason(response(text, finish), None) == reason


def test_lengths_are_those_of_the_text_that_is_kept() -> None:
    """In our tokens, without white space around the text; both limits are allowed lengths."""
    checks = make_checks(max_latent_tokens=5, min_tokens=3)
    reasons = [checks.unusable_reason(response(" " + "x" * n + "\n"), None) for n in range(2, 7)]
    assert reasons == ["too_short", None, None, None, "too_long"]
    without_tokenizer = ResponseChecks(encoder=None, max_latent_tokens=5, config=checks.config)
    assert without_tokenizer.unusable_reason(response("x" * 6), None) is None


def test_a_copy_of_the_source_is_unusable_where_the_check_is_on() -> None:
    """Half of the n-grams of the text occur in the source: ten words of it, then others."""
    source = "One two three four five six seven eight nine ten."
    copied_ngrams = 10 - COPY_NGRAM + 1
    text = f"{source.lower()} " + " ".join("abcdefghij")
    num_ngrams = 20 - COPY_NGRAM + 1
    fraction = copied_ngrams / num_ngrams
    assert copied_fraction(text, source) == pytest.approx(fraction)
    assert make_checks().unusable_reason(response(text), source) is None
    for limit, reason in ((fraction + 0.01, None), (fraction - 0.01, "copied")):
        checks = make_checks(max_copied_fraction=limit)
        assert checks.unusable_reason(response(text), source) == reason
        assert checks.unusable_reason(response(text), None) is None
    assert copied_fraction("one two three", source) == 0.0


ENGLISH = "The author wants to show that the energy of a closed system is conserved."
OTHER_LANGUAGES = """\
Das folgt aus dem Satz des Pythagoras, weil das Dreieck rechtwinklig ist.
On multiplie 12 par 5, ce qui donne 60, puis on soustrait 8.
Se multiplica 12 por 5 y se obtiene 60; luego se resta 8.
O autor quer mostrar que a energia é conservada no sistema isolado.
Автор хочет показать, что энергия сохраняется в замкнутой системе.
由题意可知,该三角形是直角三角形,所以可以使用勾股定理。
We know 12 * 5 = 60. 让我们想想: 先乘再减,所以答案是 52。
""".splitlines()
ANY_LANGUAGE = """\
8 * 9 = 72; 72 / 3 = 24
\\frac{a}{b} + \\sqrt{2} = x^2
Turns: first 3 from 8 to 1, second 0 from 1 makes 1
Euler, Lagrange, Bernoulli; Königsberg 1736.
The French word "pomme de terre" means potato, from "pomme" and "terre".
""".splitlines()


@pytest.mark.parametrize("text", OTHER_LANGUAGES)
def test_a_text_in_another_language_is_unusable_where_the_check_is_on(text: str) -> None:
    """Another one than the source's, or than the one in the settings."""
    assert make_checks().unusable_reason(response(text), ENGLISH) is None
    source, english = make_checks(language="source"), make_checks(language="en")
    assert source.unusable_reason(response(text), ENGLISH) == "other_language"
    assert source.unusable_reason(response(ENGLISH), text) == "other_language"
    assert source.unusable_reason(response(text), text) is None
    assert source.unusable_reason(response(text), None) is None
    assert english.unusable_reason(response(text), None) == "other_language"


@pytest.mark.parametrize("text", [ENGLISH, *ANY_LANGUAGE])
def test_a_text_without_a_certain_language_is_used(text: str) -> None:
    """Formulas, names, quotations."""
    for language in ("source", "en"):
        assert make_checks(language=language).unusable_reason(response(text), ENGLISH) is None
    for other in OTHER_LANGUAGES if text == ANY_LANGUAGE[0] else ():
        assert make_checks(language="source").unusable_reason(response(other), text) is None


def test_an_unknown_language_is_refused() -> None:
    """With all that are known."""
    with pytest.raises(
        UserError, match=r"language must be null, source, or one of .*\bde\b.*en-GB"
    ):
        make_checks(language="en-GB")


def test_remedies_name_the_parameter_and_its_value() -> None:
    """So that a run that was stopped can be changed."""
    checks = make_checks(
        max_latent_tokens=7, max_copied_fraction=0.3, min_tokens=2, language="source"
    )
    remedies = {
        "too_long": "max_latent_tokens (now 7)",
        "too_short": "checks.min_tokens (now 2)",
        "copied": "checks.max_copied_fraction (now 0.3)",
        "other_language": "checks.language (now source)",
        "truncated": "max_output_tokens",
        "refused": "the model and the prompt",
    }
    for reason, remedy in remedies.items():
        assert remedy in checks.remedy(reason)


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ({"content": "A fact."}, ("A fact.", False)),
        ({"content": None}, ("", False)),
        ({"content": None, "refusal": "No."}, ("", True)),
        (
            {"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "b."}]},
            ("A b.", False),
        ),
        ({"content": ["A ", "b."]}, ("A b.", False)),
        (
            {"content": [{"type": "thinking", "text": "hm"}, {"type": "text", "text": "b."}]},
            ("b.", False),
        ),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, ("", True)),
        ({"content": []}, ("", False)),
    ],
)
def test_content_in_parts_is_joined(message: dict[str, object], read: tuple[str, bool]) -> None:
    """As some compatible servers send it; thinking is not part of the text."""
    assert read_message(message) == read
