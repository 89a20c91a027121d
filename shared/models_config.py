"""Which model to load.  Apart from `shared.models`, so that a config is checked without importing torch."""

from pydantic import Field

from shared.config import Settings


class ModelSettings(Settings):
    """Which model, and how to load it."""

    model: str
    """A folder, or a name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    tokenizer: str | None = None
    """Folder or Hub name of the tokenizer, where it isn't the model's."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Tokens of the longest row; null takes what the model's config says."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model.  Off: nothing foreign is executed."""
