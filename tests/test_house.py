"""Rules of the house that no single module can hold: what may import what, who names a device, how long files are."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("shared", "teacher_dump", "student_train")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
DEVICES = re.compile(r"cuda|npu|nccl|hccl|xpu|mps")
DEVICE_METHODS = {"cuda", "npu", "xpu", "hpu"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return found


def names_a_device(source: str) -> list[str]:
    """Strings that are the name of a device (or begin with one, as cuda:0), and calls and attributes such as .cuda."""
    found = []
    docstrings = set()
    for node in ast.walk(tree := ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            docstrings.add(id(node.body[0].value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words = re.findall(r"[a-z_]+", node.value.lower())
            found += [node.value] if any(DEVICES.fullmatch(word) for word in words) else []
        elif isinstance(node, ast.Attribute) and node.attr in DEVICE_METHODS:
            found.append(f".{node.attr}")
    return found


def run_python(*arguments: str, cwd: Path, path: list[Path]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def stranger(tmp_path) -> Path:
    """A folder that holds somebody else's package named `shared`."""
    (tmp_path / "stranger" / "shared").mkdir(parents=True)
    (tmp_path / "stranger" / "shared" / "__init__.py").write_text("VERSION = 3\n")
    return tmp_path / "stranger"


@pytest.mark.parametrize("module", ["teacher_dump", "student_train", "teacher_dump.logit_shards"])
def test_house_stops_where_a_strangers_shared_wins_the_import(stranger, module):
    stopped = run_python("-c", f"import {module}", cwd=stranger.parent, path=[stranger, ROOT])
    assert stopped.returncode == 1
    assert f"another package named 'shared' hides logitferry's own: {stranger}/shared/__init__.py won" in stopped.stderr
    assert "next: take that folder's parent off PYTHONPATH" in stopped.stderr


def test_house_stops_where_a_strangers_module_or_bare_folder_wins_the_import(stranger):
    shutil.rmtree(stranger / "shared")
    (stranger / "shared.py").write_text("")
    stopped = run_python("-c", "import teacher_dump", cwd=stranger.parent, path=[stranger, ROOT])
    assert f"{stranger}/shared.py won the import" in stopped.stderr
    # A folder without __init__.py wins only where ours is not to be found at all.
    (stranger / "shared.py").unlink()
    (stranger / "shared").mkdir()
    shutil.copytree(ROOT / "student_train", stranger / "student_train", ignore=shutil.ignore_patterns("__pycache__"))
    stopped = run_python("-S", "-c", "import student_train", cwd=stranger, path=[])
    assert f"{stranger}/shared'] won the import" in stopped.stderr


def test_house_runs_where_ours_wins_the_import(stranger):
    ran = run_python("-c", "import teacher_dump, student_train", cwd=stranger.parent, path=[ROOT, stranger])
    assert ran.returncode == 0, ran.stderr


def test_house_dataset_part_needs_no_torch():
    code = "import shared.dataset, shared.logit_shards, json, sys; print(json.dumps(sorted(sys.modules)))"
    ran = run_python("-c", code, cwd=ROOT, path=[ROOT])
    assert ran.returncode == 0, ran.stderr
    loaded = set(json.loads(ran.stdout))
    assert "shared.shard_reader" in loaded
    assert not loaded & {"torch", "transformers", "safetensors", "accelerate"}


def test_house_layers_know_only_what_lies_below():
    above = {
        "shared": {"teacher_dump", "student_train"},
        "teacher_dump": {"student_train"},
        "student_train": {"teacher_dump"},
    }
    wrong = [
        f"{relative(path)} imports {name}"
        for path in FILES
        for name in imports(path)
        if name.split(".")[0] in above[relative(path).split("/")[0]]
    ]
    assert not wrong


@pytest.mark.parametrize(
    "source",
    ["x.to('cuda')", "torch.device('cuda:1')", "init('nccl')", "b = 'cpu:gloo,npu:hccl'", "x.cuda()", "torch.npu.f()"],
)
def test_house_rule_on_devices_sees_every_way_to_name_one(source):
    assert names_a_device(source)


def test_house_names_devices_in_one_file_alone():
    found = {relative(path): names_a_device(path.read_text(encoding="utf-8")) for path in FILES}
    found.pop("shared/device.py")
    assert not {path: names for path, names in found.items() if names}


def test_house_runs_nothing_that_comes_with_data():
    """No pickle in any guise, and no eval: bytes from elsewhere never become code."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    calls = {"eval", "exec", "compile", "__import__"}
    attributes = {("torch", "load"), ("torch", "save"), ("yaml", "unsafe_load"), ("yaml", "full_load")}
    wrong = []
    for path in FILES:
        wrong += [f"{relative(path)} imports {name}" for name in imports(path) if name.split(".")[0] in modules]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls:
                if ast.unparse(node) == "exec('')":  # which is there for what it leaves behind
                    continue
                wrong.append(f"{relative(path)}:{node.lineno} calls {node.func.id}")
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) in attributes
            ):
                wrong.append(f"{relative(path)}:{node.lineno} uses {node.value.id}.{node.attr}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True):
                wrong.append(f"{relative(path)}:{node.value.lineno} allows pickle")
    assert not wrong


def test_house_keeps_files_small_and_says_what_each_is_for():
    code = {path: path.read_text(encoding="utf-8") for path in FILES}
    assert len(code) > 20
    assert not {relative(path): n for path, text in code.items() if (n := text.count("\n")) > 450}
    silent = [relative(path) for path in code if path.name != "__main__.py" and not ast.get_docstring(tree_of(path))]
    assert not silent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("logitferry-*.whl")
    return found


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert "shared/FORMAT.md" in names


def test_an_installed_wheel_runs_its_commands_anywhere_also_beside_a_folder_named_shared(wheel, tmp_path):
    """In an environment of its own: of this one it sees the libraries, and not the checkout."""
    environment, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=120)
    (packages,) = environment.glob("lib/python*/site-packages")
    libraries = sysconfig.get_paths()["purelib"]  # its .pth files, an editable install's among them, are not read
    (packages / "libraries.pth").write_text(libraries)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python"]
    options = ["--no-index", "--no-deps", "--ignore-installed", "--quiet"]
    subprocess.run([*pip, "install", *options, wheel], check=True, timeout=120)
    (elsewhere / "shared").mkdir(parents=True)
    (elsewhere / "shared/__init__.py").write_text("raise RuntimeError('a stranger')")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [environment / "bin" / command[0], *command[1:]],
            cwd=elsewhere, env=variables, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    for command in ("logit-shards", "teacher-dump", "student-train"):
        for option in ("--version", "--help"):
            done = run(command, option)
            assert done.returncode == 0, done.stderr
    where = run("python", "-c", "import sys; sys.path.pop(0); import shared; print(shared.__file__)")
    assert where.stdout.startswith(str(environment)), where
    golden = ROOT / "tests/golden/v1-topk"
    assert json.loads(run("logit-shards", "verify", str(golden), "--json").stdout)
