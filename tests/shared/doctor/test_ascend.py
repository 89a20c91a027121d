"""What is said of Ascend's software: of folders laid out as CANN's installers do it, and packages that are none."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.doctor import ascend
from shared.doctor.ascend import find_cann, why_not_loaded
from shared.doctor.ascend_releases import RELEASED_WITH, fit, package_for, torch_of
from shared.doctor.finding import Finding
from tests.examined import fake_package

ROOT = Path(__file__).parents[3]
INSTALL_INFO = """package_name=Ascend-cann-toolkit
version={}
innerversion=V100R001C23SPC001B231
compatible_version=[V100R001C15],[V100R001C23]
arch=aarch64
os=linux
path=/usr/local/Ascend/{}/aarch64-linux
"""
DRIVER_INFO = """Version=25.2.0
ascendhal_version=7.35.23
Innerversion=V100R001C21SPC008B208
compatible_version=[V100R001C19],[V100R001C20]
compatible_version_fw=[7.0.0,8.9.9]
package_version=25.2.0
"""


class Box:
    """A machine of Ascend's, as far as files and packages go."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self._patch = root / "usr", patch
        for folder in (self.root, root / "dev"):
            folder.mkdir()
        patch.setattr(ascend, "ROOT", self.root)
        patch.setattr(ascend, "DEVICE_FILES", root / "dev")
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("PATH", str(root / "bin"))
        for name in ascend.HOMES:
            patch.delenv(name, raising=False)
        self.packages(None, "2.13.0+cpu")

    def packages(self, package: str | None, torch: str) -> None:
        self._patch.setattr(ascend, "package_version", lambda: package)
        self._patch.setattr(ascend, "installed", lambda name: torch)

    def cann(self, version: str, place: str = "cann", *, loaded: bool = True) -> Path:
        folder = self.root / place
        self.write(folder / "aarch64-linux" / "ascend_toolkit_install.info", INSTALL_INFO.format(version, place))
        self.write(folder / "set_env.sh", "")
        if loaded:
            self._patch.setenv("ASCEND_HOME_PATH", str(folder))
        return folder

    def driver(self) -> None:
        self.write(self.root / "driver" / "version.info", DRIVER_INFO)
        for name in ("davinci0", "davinci1", "davinci_manager"):
            self.write(self.root.parent / "dev" / name, "")

    def write(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def found(self) -> list[Finding]:
        return list(ascend.ascend())


@pytest.fixture
def box(tmp_path, monkeypatch) -> Box:
    return Box(tmp_path, monkeypatch)


def test_ascend_is_one_line_where_nothing_of_it_is(box):
    assert box.found() == [Finding("ascend", "ok", "nothing of it here: no driver, no CANN, no torch_npu")]


def test_ascend_names_all_versions_where_they_belong_together(box):
    box.driver()
    box.write(box.root / "firmware" / "version.info", "Version=7.7.0.1.231\npackage_version=25.0.rc1.1\n")
    box.packages("2.10.0.post4", "2.10.0+cpu")
    home = box.cann("9.1.0")
    assert [(each.verdict, each.found) for each in box.found()] == [
        ("ok", f"driver 25.2.0, firmware 7.7.0.1.231, 2 in {box.root.parent}/dev (davinci0, davinci1)"),
        ("ok", "torch_npu 2.10.0.post4 with torch 2.10.0+cpu"),
        ("ok", f"CANN 9.1.0 in {home}, which torch_npu 2.10.0.post4 is published to run with"),
    ]


@pytest.mark.parametrize(
    ("place", "path", "text", "version"),
    [
        ("cann", "aarch64-linux/ascend_toolkit_install.info", INSTALL_INFO.format("9.1.0-beta.2", "x"), "9.1.0-beta.2"),
        ("ascend-toolkit/latest", "x86_64-linux/ascend_toolkit_install.info", "version=8.3.RC2\n", "8.3.RC2"),
        ("ascend-toolkit/latest", "ascend_toolkit_install.info", "version=8.0.RC1\n", "8.0.RC1"),
        ("ascend-toolkit/latest", "version.cfg", "# version: 1.0\nruntime_running_version=[7.6.0.1.220:8.0.0]\n"
         "toolkit_running_version=[7.6.0.1.220:8.0.0]\n", "8.0.0"),
        ("ascend-toolkit/latest", "version.cfg", "toolkit_running_version=[8.5.2]\n", "8.5.2"),
        ("ascend-toolkit/latest", "opp/version.info", "Version=8.5.0.2.220\nversion_dir=8.5.0\n", "8.5.0"),
        ("cann", "runtime/version.info", "Version=9.0.0\n", "9.0.0"),
        ("cann", "aarch64-linux/ascend_toolkit_install.info", "\x00\xff nothing\ninnerversion=V1\n", None),
    ],
)  # fmt: skip
def test_ascend_finds_the_version_wherever_a_release_of_cann_says_it(box, place, path, text, version):
    box.write(box.root / place / path, text)
    found = find_cann()
    assert found is not None
    assert (found.folder, found.version, found.is_loaded) == (box.root / place, version, False)


def test_ascend_takes_the_cann_of_the_environment_before_any_other(box, monkeypatch):
    box.cann("9.1.0", loaded=False)
    other = box.cann("8.5.0", "elsewhere/cann-8.5.0")
    assert str(find_cann()) == f"CANN 8.5.0 in {other}"
    monkeypatch.setenv("ASCEND_HOME_PATH", "/gone")
    assert str(find_cann()) == f"CANN 9.1.0 in {box.root}/cann", "of a folder that was removed nothing is left"


def test_ascend_says_which_torch_a_torch_npu_needs(box):
    box.packages("2.10.0.post4", "2.13.0+cpu")
    box.cann("9.1.0")
    (found,) = [each for each in box.found() if each.verdict == "mend"]
    assert found.found == "torch_npu 2.10.0.post4 is built for torch 2.10.0, and torch is 2.13.0+cpu"
    assert found.next_step == "pip install torch==2.10.0"
    box.packages("2.13.0", "2.9.0")
    (found,) = [each for each in box.found() if each.verdict == "mend"]
    assert found.next_step == "pip install torch==2.13.0, or else torch_npu==2.9.0.post6"
    box.packages("2.7.1", "2.7.0")
    assert [each.verdict for each in box.found()] == ["warning"] * 3, "a patch apart, no driver, CANN 9.1"


def test_ascend_warns_where_cann_and_torch_npu_are_not_published_together(box):
    box.driver()
    box.packages("2.7.1", "2.7.1")
    home = box.cann("8.5.0")
    found = box.found()[-1]
    assert found.verdict == "warning"
    assert found.found == f"CANN 8.5.0 in {home}; torch_npu 2.7.1 was released with CANN 8.3"
    assert found.next_step == "install CANN 8.3; or, should it fail: pip install torch==2.7.1 torch_npu==2.7.1.post2"


def test_ascend_calls_an_unknown_pair_unknown_and_no_error(box):
    box.driver()
    box.packages("2.13.0", "2.13.0")
    home = box.cann("9.1.0")
    found = box.found()[-1]
    assert found.verdict == "warning"
    assert found.found == f"CANN 9.1.0 in {home}; whether torch_npu 2.13.0 runs with it is not known here"
    box.cann("17.0.0")
    assert box.found()[-1].next_step == "look it up in COMPATIBILITY.md of torch_npu"


def test_ascend_says_how_to_load_a_cann_that_only_lies_there(box):
    box.driver()
    box.packages("2.10.0.post4", "2.10.0")
    found = box.found()[-1]
    assert "no CANN is in" in found.found
    assert found.next_step.startswith(f"install CANN 9.1, then source {box.root}/ascend-toolkit/set_env.sh")
    box.cann("8.5.0", "ascend-toolkit/latest", loaded=False)
    (box.root / "ascend-toolkit/latest/set_env.sh").rename(box.root / "ascend-toolkit/set_env.sh")
    found = box.found()[-1]
    assert found.found == f"CANN 8.5.0 in {box.root}/ascend-toolkit/latest is not loaded"
    assert found.next_step.startswith(f"source {box.root}/ascend-toolkit/set_env.sh; ")


def test_ascend_warns_of_devices_that_torch_would_not_see(box):
    box.driver()
    box.cann("9.0.0")
    found = box.found()[-1]
    assert found.verdict == "warning"
    assert found.found.endswith("but torch_npu is not installed: its devices are not used")
    assert found.next_step == "pip install torch==2.10.0 torch_npu==2.10.0.post2"


def test_ascend_asks_the_tool_where_the_driver_has_no_file(box):
    box.packages("2.13.0", "2.13.0")
    assert "no driver is to be seen, no device files" in box.found()[0].found
    head = "| npu-smi 24.1.rc2            Version: 24.1.rc2                                 |"
    tool = box.write(box.root.parent / "bin" / "npu-smi", f"#!/bin/sh\necho '{head}'\n")
    tool.chmod(0o755)
    assert box.found()[0].found.startswith("driver 24.1.rc2, ")
    tool.write_text("#!/bin/sh\necho dcmi module initialize failed. ret is -8005\nexit 1\n")
    assert "no driver is to be seen" in box.found()[0].found


@pytest.mark.parametrize(
    ("package", "cann", "expected"),
    [("2.10.0.post4", "9.1.0", True), ("2.10.0.post4", "8.5.0", True), ("2.10.0.post4", "8.3.RC1", False),
     ("2.9.0.post2+git7ba04", "9.1.0-beta.2", True), ("2.6.0", "8.2.RC1", True), ("2.6.0", "8.5.0", False),
     ("2.14.0", "9.1.0", True), ("2.14.0", "9.0.0", False), ("2.13.0", "9.1.0", None)],
)  # fmt: skip
def test_releases_fit_as_is_published(package, cann, expected):
    assert fit(package, cann) is expected


def test_releases_are_found_from_either_side():
    assert [package_for("9.1"), package_for("9.1", "2.9.0"), package_for("8.2"), package_for("7.0")] == [
        "2.14.0", "2.9.0.post6", "2.6.0", None,
    ]  # fmt: skip
    assert [torch_of(each) for each in ("2.10.0.post4", "2.13.0+cpu", "2.14.0rc1", "odd")] == [
        "2.10.0", "2.13.0", "2.14.0", "odd",
    ]  # fmt: skip
    assert all(torch_of(package) in package for package in RELEASED_WITH)


TRY_TORCH = """
from shared.doctor.finding import guarded, render
from shared.doctor.machine import torch_works
print(*render(guarded("torch", torch_works)), sep="\\n")
"""
NO_LIBRARY = 'raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")\n'


def test_torch_works_says_that_cann_is_missing_instead_of_a_traceback(tmp_path):
    """torch imports torch_npu by itself, unless the package is too old to say so, as this one."""
    release = torch_of(importlib.metadata.version("torch"))
    fake_package(tmp_path, "torch_npu", release, init=NO_LIBRARY)
    ran = subprocess.run(
        [sys.executable, "-c", TRY_TORCH], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    said = ran.stdout
    assert said.startswith(f"mend     torch  torch_npu {release} is installed, but CANN isn't, or isn't loaded: ")
    assert "ImportError: libhccl.so" in said
    assert "next: install CANN" in said
    assert "set_env.sh" in said


def reason(error: BaseException) -> Finding:
    found = why_not_loaded(error)
    assert found is not None
    assert (found.check, found.verdict) == ("torch", "mend")
    return found


def test_torch_says_why_torch_npu_cannot_be_loaded(box, monkeypatch):
    no_library = RuntimeError("Failed to load the backend extension: torch_npu.")
    no_library.__cause__ = ImportError("libascendcl.so: cannot open shared object file")
    assert why_not_loaded(no_library) is None, "it is not there"
    box.packages("2.6.0", "2.13.0+cpu")
    found = reason(no_library)
    assert found.found.startswith("torch_npu 2.6.0 is built for torch 2.6.0, and torch is 2.13.0+cpu: RuntimeError: ")
    assert found.next_step.startswith("pip install torch==2.6.0")
    box.packages("2.13.0", "2.13.0+cpu")
    folder = box.cann("9.1.0")
    found = reason(no_library)
    assert found.found.startswith("torch_npu 2.13.0 is installed, but CANN isn't, or isn't loaded: RuntimeError: ")
    assert found.found.endswith("; ImportError: libascendcl.so: cannot open shared object file")
    assert found.next_step.startswith(f"source {folder}/set_env.sh; ")
    found = reason(ModuleNotFoundError("No module named 'decorator'"))
    assert found.found == (
        "torch_npu 2.13.0 is installed, but cannot be loaded: ModuleNotFoundError: No module named 'decorator'"
    )
