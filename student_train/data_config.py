"""What a run's rows are: from where, in which manner, which of them, in what order.  A part of the config."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import LocalPath, Settings
from shared.text_config import TextSettings

Manner = Literal["reasoning", "fast"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
KNOWN_DIFFICULTIES = ("length", "teacher_nll", "teacher_entropy")
"""That need no scores: supervised tokens; means over them of −log p(label) and of the entropy, of the teacher."""


class MannerSettings(Settings):
    """Rows that think before they answer, rows that answer at once, or both by weight."""

    take: Manner | dict[Manner, Annotated[float, Field(gt=0.0, allow_inf_nan=False)]]
    """One of the two, or the share of each in the rows of every step, up to a factor."""
    by: Literal["tags", "source"] = "tags"
    """What tells them apart: whether there is anything between the tags in what is supervised and before it in the
    same turn, or what the row's `source` says, see text.source_field."""
    tags: tuple[str, str] = ("<think>", "</think>")
    reasoning_sources: list[str] = []
    """by: source; of what thinks.  All other sources are fast."""

    @model_validator(mode="after")
    def _sources_where_they_tell(self) -> "MannerSettings":
        if (self.by == "source") != bool(self.reasoning_sources):
            raise ValueError("reasoning_sources and by: source go together")
        if isinstance(self.take, dict) and len(self.take) < 2:
            raise ValueError("give both manners a weight, or name one of them")
        return self


class PaceSettings(Settings):
    """Of the order competence: the share of rows, easiest first, that may be drawn, as it grows with the steps.

    After a share s of `until` it is sqrt(begin² + (1 − begin²) s) (Platanios et al., arXiv 1903.09848, equation 6).
    """

    begin: float = Field(default=0.1, gt=0.0, le=1.0)
    """At the first step."""
    until: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of the steps after which all rows are drawn, as in the order shuffled."""


class CurriculumSettings(Settings):
    """Which rows are learnt from, and in what order.  What is dropped is counted, with the reason."""

    scores: str | None = None
    """What is known of rows, by `sample_id`: .jsonl or .parquet, from `student-train score` or your own."""
    difficulty: str | None = None
    """length, teacher_nll, teacher_entropy, or a column of `scores` that is higher for harder rows, as nll."""
    order: Literal["shuffled", "easy_to_hard", "competence"] = "shuffled"
    """competence draws at random from the easiest rows, of which there are more and more."""
    pace: PaceSettings = PaceSettings()
    quantiles: tuple[Share, Share] | None = None
    """Only rows whose difficulty lies between these shares of all, as [0.2, 0.8]."""
    values: tuple[float | None, float | None] | None = None
    """Only rows whose difficulty lies between these values; null is no bound."""
    deduplicate: bool = False
    """Of rows with the same tokens, the first alone."""
    shortest_answer: bool = False
    """Of rows with the same prompt, the one with the fewest supervised tokens alone; of those that are right, where
    `right` says which are."""
    right: str | None = None
    """A column of `scores`, true or false: rows that it calls false, or does not know, are dropped."""

    @field_validator("quantiles", "values")
    @classmethod
    def _upwards(cls, band: tuple[float | None, float | None] | None) -> Any:
        if band is not None and None not in band and not band[0] < band[1]:  # pyright: ignore[reportOperatorIssue]
            raise ValueError("expected a lower and a higher bound")
        return band

    @model_validator(mode="after")
    def _consistent(self) -> "CurriculumSettings":
        needs = [name for name in ("quantiles", "values") if getattr(self, name) is not None]
        needs += [f"order: {self.order}"] if self.order != "shuffled" else []
        if needs and self.difficulty is None:
            raise ValueError(f"{needs[0]} needs a difficulty")
        if self.difficulty is not None and not needs:
            raise ValueError("difficulty is named for nothing: give an order, quantiles or values")
        of_scores = [self.right, None if self.difficulty in KNOWN_DIFFICULTIES else self.difficulty]
        if self.scores is None and any(of_scores):
            raise ValueError(f"{next(filter(None, of_scores))} would be a column of scores, and none are named")
        if self.scores is not None and not any(of_scores):
            raise ValueError("scores are named for nothing: name a column of them as difficulty or right")
        if self.pace != PaceSettings() and self.order != "competence":
            raise ValueError("pace is for order: competence")
        if all(getattr(self, name) == field.default for name, field in type(self).model_fields.items()):
            raise ValueError("says nothing: leave it away")
        return self

    @property
    def asks_rows(self) -> bool:
        """Does it ask what stands in the rows themselves?"""
        return self.deduplicate or self.shortest_answer or self.difficulty in KNOWN_DIFFICULTIES

    @property
    def asks_teacher(self) -> bool:
        """Is a row as hard as the teacher says?"""
        return self.difficulty in ("teacher_nll", "teacher_entropy")


class SourceSettings(Settings):
    ONE_SOURCE: ClassVar[str] = "name a dataset or text, one of the two"

    dataset: str | None = None
    """A sealed logit dataset: a folder or an fsspec URL."""
    text: TextSettings | None = None
    """Text files, for plain SFT without a teacher."""
    on_too_long: Literal["error", "drop", "truncate"] = "error"
    """What becomes of a dataset's rows that exceed the student's context; text has a setting of its own."""
    map_vocabulary: bool | Literal["drop"] = False
    """Take a dataset of another tokenizer of the student's family, and map ids by token; what the teacher gave to
    tokens that the student lacks goes to the tail.  Rows whose text has such tokens are an error, or dropped."""
    manner: MannerSettings | None = None
    """Of the rows that are taken, held-out ones too; null takes all."""
    curriculum: CurriculumSettings | None = None
    """Of the rows that are trained on; null shuffles all of them."""

    @field_validator("manner", mode="before")
    @classmethod
    def _manner_by_name(cls, value: Any) -> Any:
        is_short = isinstance(value, str) or (isinstance(value, dict) and value.keys() <= {"reasoning", "fast"})
        return {"take": value} if is_short else value

    @model_validator(mode="after")
    def _one_source(self) -> "SourceSettings":
        if sum(getattr(self, name, None) not in (None, []) for name in ("dataset", "text", "mix")) != 1:
            raise ValueError(self.ONE_SOURCE)
        if self.dataset is None and self.on_too_long != "error":
            raise ValueError("on_too_long is for a dataset's rows; for text say text.on_too_long")
        if self.dataset is None and self.map_vocabulary:
            raise ValueError("map_vocabulary is for a dataset's ids, and stands beside `dataset`")
        if self.text is not None and self.curriculum is not None and self.curriculum.asks_teacher:
            raise ValueError(f"difficulty: {self.curriculum.difficulty} is of a dataset's teacher, and text has none")
        return self


class MixedSettings(SourceSettings):
    weight: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Its share of the rows of every step, up to a factor; for all of the mix or for none."""


class DataSettings(SourceSettings):
    ONE_SOURCE = "name a dataset, text or mix, and one of them only"

    mix: list[MixedSettings] = []
    """Several datasets, or several texts; without weights each row comes equally often."""
    cache: LocalPath | None = None
    """Folder on this machine for what is fetched from URLs; null takes ~/.cache/logitferry/datasets."""

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> "DataSettings":
        if len({each.weight is None for each in self.mix}) > 1:
            raise ValueError("mix: give every source a weight, or none")
        if self.mix and (self.manner or self.curriculum):
            raise ValueError("mix: manner and curriculum are settings of each source of the mix")
        return self

    @property
    def has_curriculum(self) -> bool:
        """Does one of its sources have one?"""
        return any(source.curriculum for source in self.sources())

    def sources(self) -> "list[SourceSettings]":
        """What rows come from: one source, or those of the mix."""
        return list(self.mix) or [self]


class HeldOutSettings(Settings):
    fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training rows to hold out, chosen by a hash of the sample id."""
    data: DataSettings | None = None
    """Rows of their own, instead of a share."""

    @model_validator(mode="after")
    def _not_both(self) -> "HeldOutSettings":
        if self.fraction and self.data:
            raise ValueError("hold out a fraction or data of its own, not both")
        if self.data and self.data.has_curriculum:
            raise ValueError("a curriculum is for rows that are trained on")
        return self
