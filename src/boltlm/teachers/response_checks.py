"""Which responses of a teacher are usable, and why the others are not (docs/teachers.md)."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from boltlm.errors import UserError
from boltlm.param_types import NonNegativeInt, ProperFraction
from boltlm.teachers.response_cache import TeacherResponse
from boltlm.tokens import SPECIAL_TOKENS

# The reasons why a response cannot be used.
EMPTY, REFUSED, TRUNCATED, SPECIAL_TOKEN = "empty", "refused", "truncated", "special_token"
INCOMPLETE = "incomplete"  # it ended neither by the model itself nor at the token limit
TOO_LONG, TOO_SHORT, COPIED = "too_long", "too_short", "copied"
OTHER_LANGUAGE = "other_language"
REJECTED = "rejected"  # the server did not accept the request; it costs nothing
NO_ANSWER = "no_answer"  # the server answered other requests, but not this one, however often sent

COPY_NGRAM = 8  # words; terms and formulas that a text must repeat are shorter
SOURCE_LANGUAGE = "source"  # the language of the text that was asked about
# Two texts have different languages only where each is this probably in its own language and at
# most so probably in the other's: formulas and very short texts have no certain language.
_MIN_OWN_LANGUAGE, _MAX_OTHER_LANGUAGE = 0.5, 0.05

# The values of finish_reason, of various servers, that mean that the model ended the text itself.
_STOP_REASONS = ("stop", "eos", "eos_token", "end_turn")
_OPENING_MARKS = " \t\r\n\"“'*_#>"  # may come before the first word of a text

# How models decline to write. The verbs tell "I cannot provide that" from "I cannot be zero", where
# I is a current, and from what somebody in a story cannot do.
_VERBS = (
    r"(in good conscience |\w+ly )?(access|analy[sz]e|answer|assist|complete|comply|continue"
    r"|create|discuss|engage|fulfil+|generate|give you|help|offer|paraphrase|process|produce"
    r"|proceed|provide|reconstruct|reproduce|respond|rewrite|satisfy|share|summari[sz]e|supply"
    r"|support|translate|write)\b"
)
_AI = r"(AI|artificial intelligence|(large )?language model)\b"
_TEXT = r"(passage|text|document|question|message)"
_REFUSALS = (
    r"I('m| am) ((very|so|truly|deeply) )?sorry([,.;!]| (but|for any|(that )?I (can|am|do)))",
    r"I('m| am) ((very|so|truly|deeply) )?sorry to (say|inform you) that I\b",
    r"(sorry|apologies|my apologies)[,.;!]? (but|for|I|that)\b",
    r"I (sincerely |must |do )?apologi[sz]e\b",
    r"I('m| am) afraid (that )?I\b",
    rf"I('m| am) ((currently|simply) )?(unable|not able) to {_VERBS}",
    rf"I (simply |really )?(can ?not|can't|could not|couldn't) (be able to )?{_VERBS}",
    rf"I (will not|won't|would not|wouldn't) (be able to\b|{_VERBS})",
    r"I (do not|don't) (feel comfortable|have (access|the (ability|capability)|enough))\b",
    r"I('m| am) not (comfortable|allowed|permitted|in a position|programmed|designed)\b",
    r"I (must|have to|need to|will have to) (respectfully )?(decline|refuse)\b",
    r"I (respectfully )?(decline|refuse) to\b",
    rf"I('m| am) ((just|only) )?an? {_AI}",
    rf"as an? {_AI}[^.:;]{{0,60}}, (I|my)\b",
    r"it (seems|looks like|appears)( that)? you (have not|haven't|did not|didn't|forgot)\b",
    rf"it (seems|looks like|appears)( that)? (there is no|no|the|your) {_TEXT} (is|was|has)\b",
    r"((could|can|would) you )?please (provide|share|send|paste) (me )?(with )?(the|a|your)\b",
    r"(your|this) request (violates|goes against|cannot be|can't be)\b",
)
_LEAD = r"(well|unfortunately|regrettably|thank you[^.!]{0,60}|thanks[^.!]{0,60})[,.!] (but )?"
_REFUSAL = re.compile(rf"({_LEAD})?({'|'.join(_REFUSALS)})", re.IGNORECASE)


class SupportsEncode(Protocol):
    """Turns text into token ids, without special tokens."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseChecksConfig:
    """Checks of responses that a teacher may ask for.

    max_copied_fraction: the largest fraction of a response's runs of COPY_NGRAM words that may
      occur in the text that it was asked about; None: any.
    min_tokens: least length of a response, as our tokenizer counts it; 0: any.
    language: the language of the responses, SOURCE_LANGUAGE or its ISO 639-1 code; None: any.
    """

    max_copied_fraction: ProperFraction | None
    min_tokens: NonNegativeInt
    language: str | None

    def __post_init__(self) -> None:
        if self.language in (None, SOURCE_LANGUAGE):
            return
        if self.language not in (codes := _language_identifier().labels):
            raise UserError(
                f"language must be null, {SOURCE_LANGUAGE}, or one of {', '.join(sorted(codes))},"
                f" found {self.language}"
            )

    @property
    def need_source(self) -> bool:
        """Whether responses are compared with the texts that were asked about."""
        return self.max_copied_fraction is not None or self.language == SOURCE_LANGUAGE


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseChecks:
    """What a response of one teacher must fulfil.

    `encoder`: our tokenizer; without one, lengths are not checked. `max_latent_tokens`: the length
    limit of latents; None for the other tasks.
    """

    encoder: SupportsEncode | None
    max_latent_tokens: int | None
    config: ResponseChecksConfig

    def unusable_reason(self, response: TeacherResponse, source: str | None) -> str | None:
        """Why a response cannot be used, or None where it can. `source`: the text that it was asked
        about; where it is not at hand, None, it is not compared with it."""
        return (
            ending_reason(response)
            or text_reason(response.text.strip())
            or self._length_reason(response.text.strip())
            or self._copy_reason(response.text, source)
            or self._language_reason(response.text, source)
        )

    def _length_reason(self, text: str) -> str | None:
        limit, least = self.max_latent_tokens, self.config.min_tokens
        if self.encoder is None or (limit is None and least == 0):
            return None
        num_tokens = len(self.encoder.encode(text))
        if limit is not None and num_tokens > limit:
            return TOO_LONG
        return TOO_SHORT if num_tokens < least else None

    def _copy_reason(self, text: str, source: str | None) -> str | None:
        limit = self.config.max_copied_fraction
        if limit is None or source is None:
            return None
        return COPIED if copied_fraction(text, source) > limit else None

    def _language_reason(self, text: str, source: str | None) -> str | None:
        language = self.config.language
        if language is None or (language == SOURCE_LANGUAGE and source is None):
            return None
        wanted = {language: 1.0}
        if language == SOURCE_LANGUAGE and source is not None:
            wanted = language_probabilities(source)
        return OTHER_LANGUAGE if languages_differ(language_probabilities(text), wanted) else None

    def remedy(self, reason: str) -> str:
        """What a user can do where many responses are unusable for this reason."""
        checks = self.config
        remedies = {
            TRUNCATED: "raise max_output_tokens, or have the prompt ask for less",
            TOO_LONG: f"raise max_latent_tokens (now {self.max_latent_tokens}), or have the prompt"
            " ask for less",
            TOO_SHORT: f"lower checks.min_tokens (now {checks.min_tokens})",
            COPIED: f"raise checks.max_copied_fraction (now {checks.max_copied_fraction}), or"
            " change the prompt",
            OTHER_LANGUAGE: "have the prompt name the language, or change checks.language (now"
            f" {checks.language})",
        }
        return remedies.get(reason, "check the model and the prompt")


def ending_reason(response: TeacherResponse) -> str | None:
    """Why the end of a response makes it unusable, or None."""
    if response.finish == "length":
        return TRUNCATED
    if response.finish in ("refused", "content_filter"):
        return REFUSED
    return None if response.finish in _STOP_REASONS else INCOMPLETE


def text_reason(text: str) -> str | None:
    """Why a text, whatever was asked for, cannot be one that was asked for, or None."""
    if not text:
        return EMPTY
    if any(token in text for token in SPECIAL_TOKENS):
        return SPECIAL_TOKEN
    opening = text.replace("’", "'").lstrip(_OPENING_MARKS)
    return REFUSED if _REFUSAL.match(opening) else None


def copied_fraction(text: str, source: str) -> float:
    """The fraction of a text's n-grams of COPY_NGRAM words that occur in `source`; 0 for a text
    without any. Case and punctuation do not count."""
    ngrams = _ngrams(text)
    known = set(_ngrams(source))
    return sum(ngram in known for ngram in ngrams) / max(1, len(ngrams))


def _ngrams(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return list(zip(*(words[start:] for start in range(COPY_NGRAM)), strict=False))


@functools.cache
def _language_identifier() -> Any:
    # Loaded where it is needed only: its model takes a second and 100 MB.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_probabilities(text: str) -> dict[str, float]:
    """The probability of each language by its code, the most probable one first."""
    return dict(_language_identifier().rank(text))


def languages_differ(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two texts with these `language_probabilities` are certainly in different ones."""
    first, second = next(iter(one)), next(iter(other))
    return (
        min(one[first], other[second]) >= _MIN_OWN_LANGUAGE
        and max(one.get(second, 0.0), other.get(first, 0.0)) < _MAX_OTHER_LANGUAGE
    )


def read_message(message: Mapping[str, Any]) -> tuple[str, bool]:
    """The text of a chat message, and whether it is a refusal. Some servers send the content as a
    list of parts, of which those of type `text` are joined."""
    content, refused = message.get("content"), bool(message.get("refusal"))
    if not isinstance(content, list):
        return str(content or ""), refused
    parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
    texts = [str(p.get("text") or "") for p in parts if p.get("type") in ("text", "output_text")]
    return "".join(texts), refused or any(part.get("type") == "refusal" for part in parts)
