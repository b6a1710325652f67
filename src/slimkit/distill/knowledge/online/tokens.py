"""HMAC tokens with an expiry date: what a student shows to a teacher that has the same secret.

A token is ``slimkit.EXPIRY.SIGNATURE``: seconds since 1970, and the HMAC-SHA256 of them under the
secret. The teacher keeps nothing but the secret.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from pathlib import Path

from slimkit.errors import InputError, TeacherError

__all__ = ["check_secret", "check_token", "issue_token", "token_from_environment"]

_PREFIX = "slimkit"
_MIN_SECRET = 16
"""Bytes of a secret at least: 128 random bits cannot be guessed."""
TOKEN, TOKEN_FILE = "SLIMKIT_TOKEN", "SLIMKIT_TOKEN_FILE"


def check_secret(secret: bytes) -> None:
    """Make sure that a secret cannot be guessed.

    Raises:
        InputError: it is shorter than 16 bytes.
    """
    if len(secret) < _MIN_SECRET:
        raise InputError(
            f"a secret of {len(secret)} bytes can be guessed",
            where="secret",
            hint=f"at least {_MIN_SECRET} bytes, for example from: openssl rand -hex 32",
        )


def issue_token(secret: bytes, seconds: float) -> str:
    """A token that is good for so many seconds.

    Raises:
        InputError: the secret is shorter than 16 bytes.
    """
    check_secret(secret)
    expiry = str(int(time.time() + seconds))
    return f"{_PREFIX}.{expiry}.{_signature(secret, expiry)}"


def check_token(token: str, secret: bytes) -> None:
    """Raise unless the token was made with this secret and is still good.

    Raises:
        TeacherError: it is not; the message never repeats it.
    """
    parts = token.split(".")
    genuine = (
        len(token) < 200
        and token.isascii()
        and len(parts) == 3
        and parts[0] == _PREFIX
        and hmac.compare_digest(parts[2], _signature(secret, parts[1]))
    )
    if not genuine:
        raise TeacherError("the token is missing or not of this teacher", where="token")
    late = time.time() - int(parts[1])
    if late > 0:
        raise TeacherError(
            f"the token expired {late:.0f} s ago", where="token", hint="slimkit teach token"
        )


def token_from_environment() -> str | None:
    """``$SLIMKIT_TOKEN``, or the contents of the file ``$SLIMKIT_TOKEN_FILE``; read each time.

    Raises:
        InputError: the file cannot be read.
    """
    path = os.environ.get(TOKEN_FILE)
    if path is None:
        return os.environ.get(TOKEN)
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the token: {error}", where=f"${TOKEN_FILE}") from error


def _signature(secret: bytes, expiry: str) -> str:
    return hmac.new(secret, expiry.encode(), hashlib.sha256).hexdigest()
