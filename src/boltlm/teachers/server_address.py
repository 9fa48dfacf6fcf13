"""The address of an OpenAI-compatible server."""

from urllib.parse import urlsplit

from boltlm.errors import UserError

OPENAI_URL = "https://api.openai.com/v1"
# Of the header with a key that is the same whenever a request is repeated.
IDEMPOTENCY_HEADER = "Idempotency-Key"


def check_base_url(base_url: str) -> None:
    """Raises UserError where this is no address, or holds a password, which would be printed and
    stored."""
    try:
        url = urlsplit(base_url)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        valid, url = False, urlsplit("")
    if url.username or url.password or url.query:
        raise UserError(
            "base_url must hold no user name, password or query; name the variable with the"
            " server's key in api_key_env"
        )
    if not valid:
        raise UserError(
            f"base_url must be an address such as http://127.0.0.1:8000/v1, found {base_url!r}"
        )
