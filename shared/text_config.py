"""The config of text input: which files, what their records look like, which tokens are supervised."""

from typing import Any, Literal

from pydantic import Field, model_validator

from shared.config import Settings

RENDER_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "conversations", "chat_template"}


THINKING_VARIABLES = ("enable_thinking", "thinking")


class TextSettings(Settings):
    """Text to rows, for the dump and for SFT alike."""

    files: list[str]
    """Files, folders, globs or fsspec URLs, in the order their rows shall have: .jsonl, .json, .parquet, each also
    .zst or .gz but Parquet, or the folder of a saved `datasets` dataset."""
    form: Literal["auto", "chat", "prompt_response", "text", "tokens"] = "auto"
    """What a record is; auto looks at the first record of each file."""
    messages_field: str | None = None
    """Field of a chat's turns; by default `messages` or `conversations`."""
    prompt_field: str | None = None
    """Field of the user's turn; by default `prompt` or `question`."""
    response_field: str | None = None
    """Field of the assistant's turn; by default `response`, `completion` or `answer`."""
    text_field: str | None = None
    """Field of plain text; by default `text`."""
    id_field: str | None = None
    """Field of the sample id, which every record must have; by default `id` or `sample_id`, and records that have
    neither are named by their content."""
    source_field: str | None = None
    """Field that says where a record comes from, so that rows of one source can be taken out of a dataset later; by
    default the name of its file."""
    system: str | None = None
    """System turn for chats, and prompts with a response, that have none of their own."""
    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own template, such as one with {% generation %} marks."""
    chat_template_kwargs: dict[str, Any] = {}
    """Extra variables for the chat template, e.g. {enable_thinking: false}."""
    thinking_variable: str | None = "auto"
    """Variable of the chat template that is true where an answer has reasoning, and false where it has none; auto takes
    enable_thinking or thinking, whichever the template has and chat_template_kwargs does not set, and null none."""
    supervise: Literal["every_turn", "last_turn", "everything"] = "every_turn"
    """Which tokens of a chat are supervised: the assistant's, those of its last turn, or all.  Plain text is
    supervised as a whole, and ready tokens as their label_mask says."""
    supervise_reasoning: bool = True
    """False leaves out what the assistant wrote between the reasoning tags, and the tags."""
    reasoning_tags: tuple[str, str] = ("<think>", "</think>")
    """What opens and closes the assistant's reasoning."""
    control_tokens: list[str] | Literal["all"] = []
    """Special tokens that keep their meaning where a record spells them out; all others are tokenized as text there.
    The reasoning tags always keep it."""
    append_eos: bool = True
    """Plain text ends with the tokenizer's end-of-sequence token."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest row, beside the model's context."""
    on_too_long: Literal["error", "drop", "truncate"] = "error"
    """What becomes of longer rows; dropped and truncated ones are counted in the log and the manifest."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What becomes of records that cannot become rows; skipped ones are counted in the log and the manifest."""
    processes: int = Field(default=1, ge=1)
    """Processes that tokenize; does not change the rows."""

    @model_validator(mode="after")
    def _check(self) -> "TextSettings":
        if not self.files:
            raise ValueError("files names no file")
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("prompt_field and response_field go together")
        others = self.named_forms() - {self.form}
        if self.form != "auto" and others:
            raise ValueError(f"form is {self.form}, but a field of {', '.join(sorted(others))} is named")
        if self.supervise == "everything" and not self.supervise_reasoning:
            raise ValueError("supervise: everything has the reasoning in it; say every_turn to leave it out")
        if not all(self.reasoning_tags):
            raise ValueError("reasoning_tags cannot be empty")
        if self.thinking_variable in self.chat_template_kwargs:
            raise ValueError(f"chat_template_kwargs sets {self.thinking_variable}, which is the thinking_variable")
        reserved = RENDER_VARIABLES & self.chat_template_kwargs.keys()
        if reserved:
            raise ValueError(f"chat_template_kwargs cannot hold {', '.join(sorted(reserved))}")
        return self

    @property
    def thinking_variables(self) -> tuple[str, ...]:
        """Those that may be meant."""
        return THINKING_VARIABLES if self.thinking_variable == "auto" else tuple(filter(None, [self.thinking_variable]))

    def named_forms(self) -> set[str]:
        """The forms of which a field is named."""
        fields = {"chat": self.messages_field, "prompt_response": self.prompt_field, "text": self.text_field}
        return {form for form, field in fields.items() if field is not None}
