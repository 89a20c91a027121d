"""Secrets stay out of what is said and written.

They come from the environment.  A URL that holds one is refused, since URLs go into messages, logs and manifests; and
what libraries say of a failure is cleaned before it is passed on, for it may quote a header or a signed URL.
"""

import os
import re
from urllib.parse import quote, unquote

from shared.errors import ConfigError

MASK = "***"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY", re.IGNORECASE)
"""Of environment variables; paths to files are no secrets, but hiding one does no harm."""
MIN_SECRET_LENGTH = 6
"""Shorter values, such as a 1, would be hidden in every number."""
USER_AND_SECRET = re.compile(r"//[^/@:\s]*:(?!\d+(?:/|$))[^@\s]*@")
"""`//user:secret@`, with whatever characters in the secret; `//host:8080/a@b` is none."""
USER_OF_HTTP = re.compile(r"(https?://)[^/@:\s]+@", re.I)
"""A token, as git hosts take it: nobody else is named there without a password."""
NAMES_OF_SECRETS = "signature|token|credential|secret|key-?id|api-?key|password|passwd|pwd|sig|policy"
SIGNED = re.compile(rf"([?&;](?:[\w-]*(?:{NAMES_OF_SECRETS}))=)[^&;\s'\"<>)]+", re.I)


def require_no_secret(url: str) -> None:
    """Raises ConfigError for a URL with a password or key in it, without saying which."""
    if any(secret.search(each) for each in (url, unquote(url)) for secret in (USER_AND_SECRET, USER_OF_HTTP, SIGNED)):
        raise ConfigError(
            f"{masked(unquote(masked(url)))}: has a key or password in it, which would end up in logs and manifests",
            next_step="give it in the environment (HF_TOKEN, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …), the URL "
            "without it",
        )


def masked(text: str) -> str:
    """The text without secrets of the environment, of URLs and of signatures."""
    secrets = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= MIN_SECRET_LENGTH:
            text = text.replace(secret, MASK).replace(quote(secret, safe=""), MASK)
    text = USER_AND_SECRET.sub(f"//{MASK}@", text)
    text = USER_OF_HTTP.sub(rf"\g<1>{MASK}@", text)
    return SIGNED.sub(rf"\g<1>{MASK}", text)
