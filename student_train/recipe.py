"""Several stages in one config: what each of them is, and where it starts.

    student: {model: base}          what all stages share, each setting of `TrainSettings` but `output`
    output: out                     of stage NAME in out/NAME
    stages:
      reasoning: {kind: sft, data: …, epochs: 2}
      fast: {kind: sft, data: …}    starts from the model that `reasoning` has left
      kd: {kind: kd, data: …, start: fast}

A stage is a run like any other: what it does not say itself is said by the rest of the config, and then it can be run,
stopped, moved to another machine and looked at by itself.  So stages need no state of their own.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shared.config import LocalPath, Settings, check_settings, read_yaml, settings_yaml
from shared.errors import ConfigError
from shared.files import claim_folder, write_atomically
from student_train.config import TrainSettings
from student_train.run_folder import MODEL_FOLDER

RECIPE_NAME = "recipe.yaml"
"""The stages in full, in the output folder."""
REPLACED = {"data", "held_out"}
"""What a stage gives itself is all there is; of other settings the rest is as for all stages."""
EITHER = {"epochs", "steps"}

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class StageSettings(TrainSettings):
    kind: Literal["sft", "kd"]
    """Labels alone, or the teacher as well."""
    start: str | None = None
    """The stage whose model this one begins with; null takes the one before.  The first begins with student.model, and
    so does a stage that names a model of its own."""

    @model_validator(mode="after")
    def _of_its_kind(self) -> "StageSettings":
        if self.kind == "sft" and self.loss.kd_weight:
            raise ValueError("loss.kd_weight is 0 in a stage of kind: sft")
        if self.kind == "kd" and not self.loss.kd_weight:
            raise ValueError("loss.kd_weight is above 0 in a stage of kind: kd")
        return self

    def alone(self) -> TrainSettings:
        """The run that it is."""
        return TrainSettings.model_validate(self.model_dump(exclude={"kind", "start"}))


class Recipe(Settings):
    output: LocalPath
    """Folder of the stages' folders."""
    stages: dict[Name, StageSettings] = Field(min_length=1)
    """In this order."""

    @model_validator(mode="before")
    @classmethod
    def _fill_stages(cls, tree: Any) -> Any:
        """Every stage with what is said for all of them."""
        if not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
            return tree
        names = TrainSettings.model_fields.keys() - {"output"}
        common = {name: value for name, value in tree.items() if name in names}
        filled: dict[str, Any] = {}
        for place, (name, own) in enumerate(tree["stages"].items()):
            if not isinstance(own, dict):
                return {"output": tree.get("output"), "stages": tree["stages"]}  # where it will be told
            start = own.get("start") or next(reversed(filled), None)
            if own.get("start") is not None and start not in filled:
                before = ", ".join(filled) or "none"
                raise ValueError(f"stages.{name}.start: no stage before it is called {start!r}; there are: {before}")
            model = None if start is None else f"{filled[start].get('output')}/{MODEL_FOLDER}"
            student = own.get("student")
            named = student.get("model") if isinstance(student, dict) else None
            if own.get("start") is not None and named not in (None, model):
                raise ValueError(f"stages.{name}: start and student.model exclude each other")
            filled[name] = _filled(own, common, place, output=f"{tree.get('output')}/{name}", model=named or model)
        return {name: value for name, value in tree.items() if name not in names} | {"stages": filled}

    def leave_in_output(self) -> None:
        """For those who look at all stages together."""
        claim_folder(Path(self.output), [RECIPE_NAME])
        write_atomically(Path(self.output) / RECIPE_NAME, settings_yaml(self).encode())

    @model_validator(mode="after")
    def _folders_of_their_own(self) -> "Recipe":
        folders = [stage.output for stage in self.stages.values()]
        if len(set(folders)) < len(folders):
            raise ValueError("two stages have the same output")
        if len({stage.device for stage in self.stages.values()}) > 1:
            raise ValueError("all stages run on the same device")
        return self


def _filled(
    own: dict[str, Any], common: dict[str, Any], place: int, *, output: str, model: str | None
) -> dict[str, Any]:
    """A stage's tree; None begins with the model that is common to all."""
    tree: dict[str, Any] = {"output": output}
    for name, value in common.items():
        if name in EITHER and own.keys() & EITHER:
            continue
        tree[name] = value + place if name == "seed" and isinstance(value, int) else value
    tree.setdefault("seed", place)  # so that rows that come again in a later stage come in another order
    for name, value in own.items():
        merges = name not in REPLACED and isinstance(value, dict) and isinstance(tree.get(name), dict)
        tree[name] = {**tree[name], **value} if merges else value
    if own.get("kind") == "sft" and isinstance(tree.get("loss", {}), dict):
        asked = own.get("loss", {})
        is_asked = isinstance(asked, dict) and "kd_weight" in asked
        tree["loss"] = tree.get("loss", {}) | ({} if is_asked else {"kd_weight": 0, "agreement": 0})
    if model is not None and model != (own.get("student") or {}).get("model"):
        shared = {name: value for name, value in tree.get("student", {}).items() if name != "revision"}
        tree["student"] = shared | {"model": model}
    return tree


def load_runs(path: str | Path, overrides: tuple[str, ...] = ()) -> TrainSettings | Recipe:
    """What a config of `student-train run` describes: one run, or stages.

    Raises:
        ConfigError: the config cannot be used.
    """
    tree = read_yaml(Path(path))
    kind = Recipe if "stages" in tree else TrainSettings
    return check_settings(kind, tree, overrides, name=str(path), path=Path(path))


def chosen_stages(recipe: Recipe, names: tuple[str, ...]) -> dict[str, TrainSettings]:
    """Those of these names, in the order of the recipe; all of them where none is named.

    Raises:
        ConfigError: there is no such stage, or one begins with the model of another that has not been run.
    """
    for name in names:
        if name not in recipe.stages:
            raise ConfigError(f"no stage {name!r}", next_step=f"take one of {', '.join(recipe.stages)}")
    chosen = {name: stage.alone() for name, stage in recipe.stages.items() if not names or name in names}
    models = {f"{stage.output}/{MODEL_FOLDER}": name for name, stage in recipe.stages.items()}
    for name, stage in chosen.items():
        start = models.get(stage.student.model, name)
        if start not in chosen and not Path(stage.student.model).exists():
            raise ConfigError(
                f"stage {name} begins with {stage.student.model}, which stage {start} has not left yet",
                next_step=f"run --stage {start} first, or bring its model there",
            )
    return chosen


def stage_folders(folder: Path) -> list[Path]:
    """The folders of the stages of a recipe's output folder that were begun; the folder itself if it is no recipe's."""
    if not (folder / RECIPE_NAME).exists():
        return [folder]
    recipe = check_settings(Recipe, read_yaml(folder / RECIPE_NAME), (), name=str(folder / RECIPE_NAME))
    begun = [folder / name for name in recipe.stages if (folder / name).is_dir()]
    if not begun:
        raise ConfigError(f"{folder}: not one of its stages was begun", next_step="student-train run the recipe first")
    return begun
