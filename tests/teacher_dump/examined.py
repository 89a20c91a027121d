"""What tests ask of findings, and files of weights that claim to be large."""

import json
import os
import struct
from pathlib import Path

from teacher_dump.doctor.examination import Finding, exit_code


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
