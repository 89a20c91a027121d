"""How many bytes a model's weights are, told from the headers of their files."""

import json
import math
from pathlib import Path

from shared.errors import ConfigError

INDEX_NAME = "model.safetensors.index.json"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""What is cast to another dtype when it is loaded, with its bytes; anything else stays as it is."""


def loaded_bytes(folder: Path, itemsize: int | None) -> int:
    """Of all files that are loaded; floats count `itemsize` each, where they are cast.

    Raises:
        ConfigError: a file is missing or cut off.
    """
    return sum(_loaded_bytes(file, itemsize) for file in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """Those that are loaded; some repositories hold the same weights a second time under other names.

    Raises:
        ConfigError: one is missing, or there is none.
    """
    whole, index = folder / "model.safetensors", folder / INDEX_NAME
    if whole.is_file():
        names = [whole.name]
    elif index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} files of weights, first {missing[0]}" if missing else "*.safetensors"
        raise ConfigError(f"{folder} lacks {what}", next_step="download or copy the folder again, as a whole")
    return [folder / name for name in names]


def _loaded_bytes(file: Path, itemsize: int | None) -> int:
    """From the header alone."""
    import safetensors

    try:
        with safetensors.safe_open(file, framework="np") as tensors:
            slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118  it is no mapping
            floats = [(math.prod(each.get_shape()), FLOATS.get(each.get_dtype())) for each in slices]
            changes = [count * (itemsize - own) for count, own in floats if itemsize is not None and own is not None]
            return file.stat().st_size + sum(changes)
    except safetensors.SafetensorError as error:
        raise ConfigError(
            f"{file} is cut off, or not what it should be: {error}", next_step="download or copy it again"
        ) from error
