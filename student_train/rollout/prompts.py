"""What is asked: the prompts of rows, each once, and the references that replies are compared with.

A prompt is the very ids that its row was trained or dumped with; see `student_train.eval.exact_match`.  They are read
and checked before the student is loaded.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import transformers

from shared.errors import ConfigError
from shared.fingerprint import RowsDigest
from shared.models_config import ModelSettings
from shared.pretrained import load_config
from shared.records import RecordReader, asked_of
from shared.rows import Int32, Row
from student_train.data_config import DataSettings
from student_train.eval.exact_match import asking_rows, draw, reference_text, stops_of
from student_train.eval.generation import Stops
from student_train.rollout.config import RolloutSettings
from student_train.rollout.verifier import Verifier
from student_train.sources import open_dataset, open_source

logger = logging.getLogger("logitferry")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question."""

    prompt_id: str
    """The sample id of the row that is asked."""
    source: str
    """Where that row comes from."""
    ids_L: Int32
    reference: str
    can_verify: bool
    """Whether there is anything in the reference to compare a reply with."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Those of all rows that were drawn."""

    asked: list[Prompt]
    stops: Stops
    digest: str
    """Of prompts, references and stops."""
    tally: dict[str, int]
    """What became of the rows."""


def read_prompts(
    settings: RolloutSettings, tokenizer: Any, verifier: Verifier | None, *, context_tokens: int | None
) -> Prompts:
    """What the rows ask, in their order.

    Raises:
        ConfigError: there is nothing to ask, or two prompts have one id.
        MismatchError, RecordError, DamagedDataError: the data cannot be used; see `student_train.sources`.
    """
    config = load_config(settings.student)
    sources = [
        open_source(
            source,
            tokenizer,
            vocab_size=config.get_text_config().vocab_size,
            context_tokens=context_tokens,
            cache=settings.data.cache,
        )
        for source in settings.data.sources()
    ]
    asking, num_rows = asking_rows(draw(sources, settings.rows, settings.seed))
    stops = stops_of(asking, _configs(settings.student, config), tokenizer)
    tally = {"rows": num_rows, "without_prompt": num_rows - len(asking), "repeated": 0, "uncheckable": 0}
    asked: dict[str, Prompt] = {}
    for each in asking:
        reference = reference_text(each, stops, tokenizer)
        prompt = Prompt(
            prompt_id=asked_of(each.row.sample_id),
            source=each.row.source,
            ids_L=each.prompt_L.copy(),
            reference=reference,
            can_verify=verifier is not None and verifier.has_answer(reference),
        )
        if (earlier := asked.get(prompt.prompt_id)) is not None:
            _require_same(earlier, prompt)
            tally["repeated"] += 1
        elif verifier is not None and not prompt.can_verify:
            tally["uncheckable"] += 1
            if settings.keep.wrong:
                asked[prompt.prompt_id] = prompt
        else:
            asked[prompt.prompt_id] = prompt
    _report(tally, len(asked), is_asked=settings.keep.wrong)
    prompts = list(asked.values())
    return Prompts(asked=prompts, stops=stops, digest=_digest(prompts, stops), tally=tally)


def data_identity(data: DataSettings) -> list[dict[str, Any]]:
    """Equal where the data are, as far as that is known without reading every row."""
    known = []
    for source in data.sources():
        tree = source.model_dump(mode="json", exclude={"dataset", "text", "mix", "cache", "weight"})
        if not source.map_vocabulary:  # of which earlier plans know nothing
            del tree["map_vocabulary"]
        if source.dataset is not None:
            tree["manifest_sha256"] = open_dataset(source.dataset, data.cache).identity()
        else:
            assert source.text is not None
            tree["text"] = source.text.model_dump(mode="json", exclude={"files", "processes"})
            tree["files"] = [file.sha256() for file in RecordReader(source.text).files]
        known.append(tree)
    return known


def _configs(student: ModelSettings, config: Any) -> Any:
    """The two configs of a model, without the model."""
    try:
        generation = transformers.GenerationConfig.from_pretrained(student.model, revision=student.revision or "main")
    except OSError:  # there is none
        generation = transformers.GenerationConfig.from_model_config(config)
    return SimpleNamespace(config=config, generation_config=generation)


def _require_same(earlier: Prompt, prompt: Prompt) -> None:
    if earlier.ids_L.tolist() != prompt.ids_L.tolist():
        raise ConfigError(
            f"two prompts have the id {prompt.prompt_id!r}, one from {earlier.source} and one from {prompt.source}",
            next_step="make the ids unique, or take one source at a time",
        )


def _digest(prompts: Sequence[Prompt], stops: Stops) -> str:
    digest = RowsDigest()
    for each in prompts:
        mask_L = each.ids_L < 0
        digest.add(Row(sample_id=each.prompt_id, source=each.source, input_ids_L=each.ids_L, label_mask_L=mask_L))
        digest.add(Row(sample_id=each.reference, input_ids_L=each.ids_L[:0], label_mask_L=mask_L[:0]))
    return f"{digest.text()}, stops {sorted(stops.ids)}"


def _report(tally: dict[str, int], num_asked: int, *, is_asked: bool) -> None:
    said = {
        "without_prompt": "have no prompt before what is supervised",
        "repeated": "ask what another row asks under the same id",
        "uncheckable": f"have a reference without an answer by verify.answer, and {'' if is_asked else 'are not asked'}"
        f"{'their replies are not marked' if is_asked else ''}",
    }
    for name, words in said.items():
        if tally[name]:
            logger.warning("%d of %d rows %s", tally[name], tally["rows"], words)
    if not num_asked:
        raise ConfigError(
            f"not one of {tally['rows']} rows can be asked",
            next_step="give data of chats or prompts with responses, whose references verify.answer fits",
        )
