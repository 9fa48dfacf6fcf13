"""The API key of a teacher: which variable names it, and where it is read."""

import os
from pathlib import Path

from dotenv import dotenv_values

from boltlm.errors import UserError, hide_secret
from boltlm.shard_store import repository_path
from boltlm.teachers.model_config import APITeacherConfig
from boltlm.teachers.server_address import OPENAI_URL

API_KEY_VARIABLE = "OPENAI_API_KEY"
ENV_FILE = ".env"
NO_KEY = "none"  # the client wants some value; servers that need no key ignore it


def key_variable(config: APITeacherConfig) -> str | None:
    """The variable that holds the key for a teacher's server; None where none is sent to it, so
    that the key for OpenAI never reaches another server unasked."""
    default = API_KEY_VARIABLE if config.url == OPENAI_URL else None
    return config.api_key_env or default


def read_api_key(config: APITeacherConfig) -> str:
    """The API key, from the environment or from `.env` at the repository's root, without white
    space around it; no message shows it from then on. Raises UserError where it is missing or is
    no key."""
    variable = key_variable(config)
    if variable is None:
        return NO_KEY
    key = (os.environ.get(variable) or "").strip()
    if not key:
        key = (dotenv_values(repository_path(Path(ENV_FILE))).get(variable) or "").strip()
    if not key:
        raise UserError(
            f"no API key for {config.server}: set {variable} in the environment or in a file"
            f" {ENV_FILE} at the repository's root, or set base_url to the address of your own"
            " server, or use a teacher of kind dataset or vllm"
        )
    hide_secret(key)
    # White space or other characters inside it would make an illegal HTTP header.
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"{variable} is no API key: it contains white space or characters that are not ASCII"
        )
    return key
