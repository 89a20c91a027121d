"""What of Ascend's software `doctor` looks at: driver, firmware, CANN, and torch_npu against torch and CANN.

From files and the packages' metadata alone: torch imports torch_npu by itself, and cannot be imported where that fails,
as without CANN.

CANN's folder is `ascend-toolkit/latest` up to 8.3 and `cann` from 8.5 on, below /usr/local/Ascend, or ~/Ascend where it
was not installed by root; its set_env.sh names the folder in the environment.  The version is in
`<arch>-linux/ascend_toolkit_install.info` (version=8.3.RC2), and in parts of it in `version.cfg`
(toolkit_running_version=[7.6.0.1.220:8.0.0]) or `<component>/version.info` (version_dir=8.5.0, Version=8.5.0.2.220);
that of the driver and the firmware in their `version.info` (package_version=25.2.0).
Source: hiascend.com, CANN Software Installation Guide 8.0.0 and 8.5.0, File Paths.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.doctor.ascend_releases import fit, package_for, released_with, series_of, torch_of
from shared.doctor.finding import Finding, reason_of
from shared.doctor.requirements import installed

PACKAGE = "torch_npu"
ROOT = Path("/usr/local/Ascend")
DEVICE_FILES = Path("/dev")
HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
VERSION_FILES = (
    ("*-linux/ascend_toolkit_install.info", r"version=([\w.+-]+)"),
    ("ascend_toolkit_install.info", r"version=([\w.+-]+)"),
    ("version.cfg", r"toolkit_running_version=\[(?:[^]:]*:)?([\w.+-]+)\]"),
    ("*/version.info", r"version_dir=([\w.+-]+)"),
    ("*/version.info", r"Version=([\w.+-]+)"),
)
ASKED_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Cann:
    folder: Path
    version: str | None
    is_loaded: bool
    """Whether set_env.sh was sourced."""

    @property
    def script(self) -> Path:
        """What loads it."""
        places = (self.folder, self.folder.parent)
        return next((place / "set_env.sh" for place in places if (place / "set_env.sh").is_file()), ROOT / "set_env.sh")

    def __str__(self) -> str:
        return f"CANN {self.version or 'of unknown version'} in {self.folder}"


def ascend() -> Iterator[Finding]:
    """All that is there, and what does not belong together."""
    package, cann, driver = package_version(), find_cann(), driver_version()
    device_files = sorted(path.name for path in DEVICE_FILES.glob("davinci[0-9]*"))
    if package is None and cann is None and driver is None and not device_files:
        yield Finding("ascend", "ok", f"nothing of it here: no driver, no CANN, no {PACKAGE}")
        return
    yield _of_driver(driver, device_files)
    if package is None:
        yield _without_package(cann, bool(device_files))
        return
    yield _of_torch(package)
    yield _of_cann(package, cann)


def package_version() -> str | None:
    """Of torch_npu, where it is installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    return installed(PACKAGE) or "of unknown version"


def find_cann() -> Cann | None:
    """That of the environment, else the one that lies where it is installed by default."""
    named = [Path(os.environ[name]) for name in HOMES if os.environ.get(name)]
    roots = (ROOT, Path("~/Ascend").expanduser())
    usual = [root / place for root in roots for place in ("cann", "ascend-toolkit/latest")]
    for folder in (*named, *usual):
        if folder.is_dir():
            return Cann(folder=folder, version=_version_in(folder), is_loaded=folder in named)
    return None


def _version_in(folder: Path) -> str | None:
    for pattern, line in VERSION_FILES:
        for path in sorted(folder.glob(pattern)):
            if found := _line_of(path, line):
                return found
    return None


def _line_of(path: Path, line: str) -> str | None:
    """What a line of a file says, where there is such a line."""
    try:
        found = re.search(rf"^\s*{line}", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def driver_version() -> str | None:
    """From its file, else from its tool; None where there is neither."""
    for line in (r"package_version=([\w.+-]+)", r"Version=([\w.+-]+)"):
        if found := _line_of(ROOT / "driver" / "version.info", line):
            return found
    # The tool is named after the device, as the package is.
    tool = shutil.which(f"{PACKAGE.removeprefix('torch_')}-smi")
    if tool is None:
        return None
    try:
        said = subprocess.run([tool, "info"], capture_output=True, text=True, timeout=ASKED_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    found = re.search(r"Version:\s*([\w.]+)", said)
    return found[1] if found else None


def _of_driver(driver: str | None, device_files: list[str]) -> Finding:
    devices = (
        f"{len(device_files)} in {DEVICE_FILES} ({', '.join(device_files)})" if device_files else "no device files"
    )
    if driver is None:
        mend = f"install the driver; into a container pass {ROOT}/driver, and /dev/davinci0 and so on as devices"
        return Finding("ascend", "warning", f"no driver is to be seen, {devices}", mend)
    firmware = _line_of(ROOT / "firmware" / "version.info", r"Version=([\w.+-]+)")
    found = f"driver {driver}" + (f", firmware {firmware}" if firmware else "") + f", {devices}"
    return Finding(
        "ascend", "ok" if device_files else "warning", found, "into a container pass /dev/davinci0 and so on"
    )


def _without_package(cann: Cann | None, has_devices: bool) -> Finding:
    """The machine could be of Ascend's, but torch knows nothing of it."""
    wanted = package_for(series_of(cann.version)) if cann and cann.version else None
    mend = f"pip install {PACKAGE}, in the release that belongs to CANN"
    if wanted is not None:
        mend = f"pip install torch=={torch_of(wanted)} {PACKAGE}=={wanted}"
    found = f"{cann or 'no CANN'}, but {PACKAGE} is not installed"
    return Finding("ascend", "warning" if has_devices else "ok", f"{found}: its devices are not used", mend)


def _of_torch(package: str) -> Finding:
    torch, wanted = installed("torch"), torch_of(package)
    if torch is None or torch_of(torch) == wanted:
        return Finding("ascend", "ok", f"{PACKAGE} {package} with torch {torch}")
    other = package_for(None, torch_of(torch))
    mend = f"pip install torch=={wanted}" + (f", or else {PACKAGE}=={other}" if other else "")
    is_near = torch_of(torch).rpartition(".")[0] == wanted.rpartition(".")[0]
    found = f"{PACKAGE} {package} is built for torch {wanted}, and torch is {torch}"
    return Finding("ascend", "warning" if is_near else "mend", found, mend)


def _of_cann(package: str, cann: Cann | None) -> Finding:
    own = released_with(package)
    if cann is None:
        found = f"no CANN is in {ROOT} or ~/Ascend, and none of {', '.join(HOMES)} names one that is there"
        return Finding("ascend", "warning", found, _how_to_load(None, own))
    if not cann.is_loaded:
        return Finding("ascend", "warning", f"{cann} is not loaded", _how_to_load(cann, own))
    if cann.version is None:
        return Finding("ascend", "warning", f"{cann}", f"see that it is the one for {PACKAGE} {package}")
    if fits := fit(package, cann.version):
        return Finding("ascend", "ok", f"{cann}, which {PACKAGE} {package} is published to run with")
    other = package_for(series_of(cann.version), torch_of(package)) or package_for(series_of(cann.version))
    mend = f"should it fail: pip install torch=={torch_of(other)} {PACKAGE}=={other}" if other else None
    if fits is None:
        found = f"{cann}; whether {PACKAGE} {package} runs with it is not known here"
        mend = mend or f"look it up in COMPATIBILITY.md of {PACKAGE}"
        return Finding("ascend", "warning", found, mend)
    found = f"{cann}; {PACKAGE} {package} was released with CANN {own}"
    return Finding("ascend", "warning", found, f"install CANN {own}" + (f"; or, {mend}" if mend else ""))


def why_not_loaded(error: BaseException) -> Finding | None:
    """What torch's failure has to do with torch_npu; None where that is not installed."""
    package = package_version()
    if package is None:
        return None
    reason, cann = reason_of(error), find_cann()
    pair = _of_torch(package)
    if pair.verdict == "mend":
        return Finding("torch", "mend", f"{pair.found}: {reason}", pair.next_step)
    if re.search(r"lib\w+\.so|set_env|ASCEND_|CANN", reason):
        found = f"{PACKAGE} {package} is installed, but CANN isn't, or isn't loaded: {reason}"
        return Finding("torch", "mend", found, _how_to_load(cann, released_with(package)))
    found = f"{PACKAGE} {package} is installed, but cannot be loaded: {reason}"
    return Finding("torch", "mend", found, f"on a machine without such devices: pip uninstall {PACKAGE}")


def _how_to_load(cann: Cann | None, own: str | None) -> str:
    wanted = f"CANN {own}" if own else "CANN"
    load = f"source {cann.script if cann else ROOT / 'ascend-toolkit' / 'set_env.sh'}"
    if cann is None:
        load = f"install {wanted}, then {load} (of 8.5 and later {ROOT / 'cann' / 'set_env.sh'})"
    return f"{load}; on a machine without such devices: pip uninstall {PACKAGE}"
