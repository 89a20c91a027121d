"""A first config for a dump, made of what the model and the data say of themselves.

It is looked at before anything is written: the tokenizer, the first record, the tokens that end turns and open tools,
and what could run the teacher here.
"""

from pathlib import Path
from typing import Any

from shared.commented_yaml import require_new, write_config_file
from shared.config import check_settings
from shared.first_record import FirstRecord, first_record
from shared.models_config import ModelSettings
from shared.vllm_start import vllm_version
from teacher_dump.config import DumpSettings

TURN_TOKENS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|call|>", "<|end_of_text|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>",
)  # fmt: skip
"""What ends turns, opens and closes reasoning and calls tools, as common tokenizers spell it."""


def write_config(
    path: Path, *, model: str, files: list[str], output: str, engine: str | None, tokenizer: str | None
) -> list[str]:
    """Write a commented config to `path`, and say in lines for people what was found.

    `engine` None takes vllm where it is installed and there is an accelerator, else transformers.

    Raises:
        ConfigError: there is a file already, no such tokenizer, or a setting that cannot be used.
        ConfigError, RecordError, DamagedDataError: the data cannot be read.
        OutputError: the file cannot be written.
    """
    from shared.pretrained import load_tokenizer

    require_new(path)
    loaded = load_tokenizer(ModelSettings(model=model, tokenizer=tokenizer))
    chosen, why = (engine, "as asked for") if engine else _engine_for_this_machine()
    always = tokens_to_keep(loaded)
    teacher: dict[str, Any] = {
        "model": model,
        **({"tokenizer": tokenizer} if tokenizer else {}),
        "engine": chosen,
        "dtype": "auto",
    }
    if chosen == "vllm":
        teacher["vllm"] = {"tensor_parallel": 1, "memory_fraction": 0.9}
    tree = {
        "teacher": teacher,
        "data": {"files": files, "supervise": "every_turn", "on_too_long": "error"},
        "output": output,
        "keep": {"method": "topk", "k": 64, "always": always},
        "temperatures": [1.0],
    }
    settings = check_settings(DumpSettings, tree, (), name="the config to write")
    first = first_record(settings.data)
    write_config_file(path, DumpSettings, tree, command="teacher-dump run")
    return [
        f"{path}: written",
        f"  tokenizer: {tokenizer or model}, {len(loaded):,} tokens{_template(loaded, first)}",
        f"  data: {first.describe()}",
        f"  engine: {chosen}, {why}",
        f"  keep.always: {', '.join(always) or 'the tokenizer has no token that would have to be'}",
        f"  next: logit-shards inspect {path}",
    ]


def tokens_to_keep(tokenizer: Any) -> list[str]:
    """The end of a sequence and of a turn, and the tags of reasoning and tools, as far as each is an added token.

    One that is not is cut into pieces, of which none means what the whole does.
    """
    own = {token.content for token in tokenizer.added_tokens_decoder.values()} & tokenizer.get_vocab().keys()
    wanted = [tokenizer.eos_token, *TURN_TOKENS] if tokenizer.eos_token else TURN_TOKENS
    return [token for token in dict.fromkeys(wanted) if token in own]


def _engine_for_this_machine() -> tuple[str, str]:
    from shared.device import pick_device

    version, device = vllm_version(), pick_device("auto")
    if version is None:
        return "transformers", "since vLLM is not installed here"
    if device.type == "cpu":
        return "transformers", f"since vLLM {version} is installed, but there is no accelerator here"
    return "vllm", f"since vLLM {version} is installed and there is an accelerator here"


def _template(tokenizer: Any, first: FirstRecord) -> str:
    is_chat = first.layout.form in ("chat", "prompt_response")
    return "" if tokenizer.chat_template or not is_chat else "; it has no chat template: give data.chat_template"
