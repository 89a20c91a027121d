"""One small tree of errors.  Each also inherits the stdlib class it stands for, and knows its exit code.

Exit codes of every command: 0 done · 1 any other failure · 2 usage or config · 3 data damaged ·
4 things that do not belong together · 75 interrupted, run again.

A message says what, where, expected and got; `next_step` is the command or edit to try next, and where one place has
nothing better to say than all others of its kind, `usual_step` is.
"""

INTERRUPTED_EXIT_CODE = 75


class LogitferryError(Exception):
    """Base of all errors that a user can do something about."""

    exit_code = 1
    usual_step = "mend what the message names, then run the same command again"

    def __init__(self, message: str, *, next_step: str | None = None) -> None:
        super().__init__(message)
        self.next_step = next_step

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  next: {self.next_step}" if self.next_step else message

    def told(self) -> str:
        """For whoever ran a command, who always learns what to do next."""
        return str(self) if self.next_step else f"{self}\n  next: {self.usual_step}"


class ConfigError(LogitferryError, ValueError):
    """A config file or option that cannot be used as it stands."""

    exit_code = 2
    usual_step = "mend that in the config or on the command line; --help says what there is"


class RecordError(LogitferryError, ValueError):
    """A record of an input text file that cannot become a row."""

    exit_code = 3
    usual_step = "mend that record or take it out, then run the same command again"


class DamagedDataError(LogitferryError, OSError):
    """Bytes on disk that are not what was written: a digest, checksum or footer that does not hold."""

    exit_code = 3
    usual_step = "copy that file again from where it is whole, then run the same command again"

    # OSError has a __str__ of its own for its errno forms; ours is the one to show.
    __str__ = LogitferryError.__str__


class DamagedManifestError(DamagedDataError):
    """A manifest that is none, or that says what no dataset can hold."""


class DamagedShardError(DamagedDataError):
    """A shard that is missing, is not the bytes that were written, or holds what no writer of the format produces."""

    usual_step = "`logit-shards verify` on the dataset lists every fault; copy these shards again, or `repair` it"


class MisalignedRowError(DamagedShardError):
    """A row that does not hold exactly one distribution per supervised token, in order."""


class UnsealedDatasetError(LogitferryError, FileNotFoundError):
    """A dataset folder without a manifest: the dump has not finished."""

    exit_code = 3
    __str__ = LogitferryError.__str__


class UnknownVersionError(LogitferryError, ValueError):
    """A dataset written in a format version that this release does not read."""

    exit_code = 4


class MismatchError(LogitferryError, ValueError):
    """Things that do not belong together: tokenizers, vocabularies, a resumed dump with other settings."""

    exit_code = 4


class ForeignTokenizerError(MismatchError):
    """A tokenizer that gives other ids than the one a dataset was made with."""


class OutputError(LogitferryError, OSError):
    """A file or folder that cannot be written: no permission, no space."""

    __str__ = LogitferryError.__str__


class NonFiniteError(LogitferryError, ArithmeticError):
    """NaN or infinite numbers where finite ones are needed."""


class NoMemoryError(LogitferryError, MemoryError):
    """A device, or the host, has no room for what was asked of it."""


class DivergedError(LogitferryError, ArithmeticError):
    """A training step that is far from those before it."""
