"""Entry point of `logit-shards`, which is all in `shared`.

It lives here because importing `teacher_dump` checks that `shared` is ours; an entry point inside
`shared` could not say anything where a stranger's package of that name wins the import.
"""

from shared.logit_shards import main

__all__ = ["main"]
