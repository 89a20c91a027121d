"""What tests ask of a doctor's findings, and the packages and files of weights that they are about."""

import json
import os
import struct
from pathlib import Path

from shared.doctor.finding import Finding, exit_code


def of(check: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


def verdicts(check: str, findings: list[Finding]) -> list[str]:
    return [finding.verdict for finding in of(check, findings)]


def mended(check: str, findings: list[Finding]) -> Finding:
    """The one finding of the whole that has to be mended, which is of this check."""
    (found,) = [finding for finding in findings if finding.verdict == "mend"]
    assert found.check == check
    assert exit_code(findings) == 1
    return found


def write_weights(path: Path, **tensors: tuple[str, int]) -> Path:
    """A safetensors file of the claimed types and lengths, which are zeros that take no disk."""
    header, end = {}, 0
    for name, (dtype, length) in tensors.items():
        begin, end = end, end + length * {"F32": 4, "BF16": 2, "I8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": [length], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def fake_package(site: Path, name: str, version: str, **files: str) -> None:
    """What says that it is a version of a package; `entry_points` and `init` are its files of these names."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if "entry_points" in files:
        (info / "entry_points.txt").write_text(files["entry_points"])
    if "init" in files:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(files["init"])
