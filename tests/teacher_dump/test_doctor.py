"""What `doctor` finds on real files: a fit machine and config, and each of the ways in which one is not."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from shared.doctor import devices, output, requirements
from shared.folders import open_folder
from shared.vllm_start import TESTED_VERSIONS, vllm_version
from teacher_dump.config import DumpSettings
from teacher_dump.doctor import examination, machine
from teacher_dump.doctor.examination import Finding, examine, exit_code, render
from tests.data import chat_records, dump_settings, write_jsonl
from tests.examined import fake_package, mended, of, verdicts
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
VLLM = {"teacher__engine": "vllm", "teacher__device": "auto"}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(3))


@pytest.fixture
def settings(teacher_folder, chats, tmp_path):
    """Settings with some changed; the output is not there yet."""

    def changed(**changes) -> DumpSettings:
        output = changes.pop("output", tmp_path / "deep" / "out")
        return dump_settings(teacher_folder, chats, output, **changes)

    return changed


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs what says that it is a version of a package."""

    def installing(name: str, version: str) -> None:
        fake_package(tmp_path / "site", name, version)
        monkeypatch.syspath_prepend(tmp_path / "site")

    return installing


def test_doctor_finds_nothing_to_mend_where_all_is_well_and_leaves_nothing_behind(settings, tmp_path):
    findings = examine(settings())
    assert exit_code(findings) == 0
    assert [finding for finding in findings if finding.verdict == "mend"] == []
    assert os.listdir(tmp_path) == []
    checks = list(dict.fromkeys(finding.check for finding in findings))
    machine = ["python", "packages", "torch", "vllm", "devices", "memory", "forward"]
    assert checks == [*machine, "model", "tokenizer", "weights", "data", "disk", "output"]
    shown = "\n".join(render(findings))
    for text in (
        f"torch {importlib.metadata.version('torch')}",
        "Qwen2ForCausalLM",
        "in float32 on cpu",
        "chats.jsonl:1 is chat (messages)",
    ):
        assert text in shown
    assert "1 records, 1 rows" in shown


def test_doctor_without_settings_looks_at_the_machine_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    findings = examine(None)
    assert exit_code(findings) == 0
    assert of("forward", findings)[0].found.startswith("tried a product in float32 and bfloat16 on ")
    assert not {finding.check for finding in findings} & {"model", "tokenizer", "weights", "data", "disk", "output"}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), SystemExit(3), OSError(5, "Input/output error")])
def test_doctor_makes_a_finding_of_a_check_that_fails(monkeypatch, error):
    def failing():
        yield Finding("memory", "ok", "so far")
        raise error

    monkeypatch.setattr(examination, "memory", failing)
    findings = examine(None)
    assert verdicts("memory", findings) == ["ok", "mend"], "what it found before is not lost"
    assert mended("memory", findings).found.startswith(type(error).__name__)
    assert verdicts("forward", findings) == ["ok"], "the others go on"


@pytest.mark.skipif(vllm_version() is not None, reason="vLLM is installed")
def test_doctor_minds_a_missing_vllm_only_where_it_is_asked_for(settings):
    assert verdicts("vllm", examine(settings())) == ["ok"]
    found = mended("vllm", examine(settings(**VLLM)))
    assert "not installed" in found.found
    assert found.next_step.startswith("pip install 'logitferry[vllm]'")


@pytest.mark.skipif(vllm_version() is not None, reason="vLLM is installed")
def test_doctor_warns_of_a_vllm_that_was_not_tested_and_tries_to_import_it(settings, install):
    install("vllm", "9.9.9")
    (found,) = of("vllm", examine(settings()))
    assert found.verdict == "warning"
    assert found.found == f"9.9.9 is not among the versions that were tested ({', '.join(TESTED_VERSIONS)}.x)"
    findings = examine(settings(**VLLM))
    assert verdicts("vllm", findings) == ["warning", "mend"]
    assert mended("vllm", findings).found.startswith("ModuleNotFoundError: No module named 'vllm")


def test_doctor_mends_packages_that_are_too_old_or_missing(install, monkeypatch):
    install("zstandard", "0.1.0")
    found = mended("packages", examine(None))
    (floor,) = [each.floor for each in requirements.requirements() if each.name == "zstandard"]
    assert found.found == f"zstandard is 0.1.0; {floor} or later is needed"
    assert found.next_step == f"pip install 'zstandard>={floor}'"
    monkeypatch.setattr(requirements, "requires", lambda name: ["never-there>=1.5", "other>=3; extra == 'ray'"])
    found = mended("packages", examine(None))
    assert found.found == "never-there is not installed; 1.5 or later is needed"


def run_apart(prepare: str, *settings: DumpSettings | None, path: Path = ROOT) -> str:
    """`examine` in a process of its own: lines and exit code for each of the settings."""
    code = (
        f"import sys\n{prepare}\n"
        "from teacher_dump.doctor.examination import *\nfrom teacher_dump.config import DumpSettings\n"
        f"for text in {[each and each.model_dump_json() for each in settings]!r}:\n"
        "    findings = examine(text and DumpSettings.model_validate_json(text))\n"
        "    print(*render(findings), f'exit code {exit_code(findings)}', sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def test_doctor_tries_an_accelerator_and_counts_the_devices_that_vllm_shall_have(settings):
    register = "from tests.fake_npu import register\nregister()"
    many = settings(**VLLM, teacher__vllm={"tensor_parallel": 4})
    output, of_many = run_apart(register, settings(teacher__device="auto"), many).split("exit code 0")
    assert "npu:0: of unknown name, does not say how much memory it has" in output
    assert "tried a product in float32 on npu:0" in output
    assert "npu:0 does not say how much memory it has" in output.split("weights")[1]
    assert "tensor_parallel × pipeline_parallel is 4, but there are 1 devices" in of_many
    assert "exit code 1" in of_many


def test_doctor_mends_a_device_that_cannot_be_used_and_says_so_once(settings):
    found = mended("devices", examine(settings(teacher__device="cuda:99")))
    assert "device 'cuda:99' cannot be used here" in found.found
    assert found.next_step == "set device: auto"


def test_doctor_mends_a_device_that_computes_nonsense(settings, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: left + right)
    found = of("forward", examine(settings(teacher__dtype="bfloat16")))[0]
    assert found.verdict == "mend"
    assert found.found == "cpu: a product in bfloat16 should be 64, and is [2.0]"


def test_doctor_knows_what_a_container_may_use(settings, tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "CGROUP_LIMITS", (limit, tmp_path / "none"))
    limit.write_text("max\n")
    assert verdicts("weights", examine(settings())) == ["ok"]
    limit.write_text("1048576\n")
    findings = examine(settings())
    assert of("memory", findings)[0].found == "of the host 1.0 MiB available of 1.0 MiB"
    assert "the host: 1.0 MiB free of 1.0 MiB" in mended("weights", findings).found


def test_doctor_mends_a_missing_accelerate_where_a_device_map_needs_it(settings, monkeypatch):
    monkeypatch.setattr(machine, "installed", lambda name: None)
    assert not of("accelerate", examine(settings())), "nothing else needs it"
    found = mended("accelerate", examine(settings(teacher__device="auto", teacher__device_map="auto")))
    assert found.next_step == "pip install accelerate"


def test_doctor_mends_a_model_that_is_not_there_and_looks_at_the_rest(settings, tmp_path):
    findings = examine(settings(teacher__model=str(tmp_path / "none")))
    assert verdicts("model", findings) == ["mend"]
    assert of("model", findings)[0].found == f"model folder {tmp_path}/none does not exist"
    assert not of("weights", findings)
    assert (verdicts("data", findings), verdicts("disk", findings)) == (["ok"], ["ok"])
    found = mended("model", examine(settings(teacher__model="nobody/nothing")))
    assert "nobody/nothing, of which there is no folder here, from the Hub" in found.found
    assert "hf download nobody/nothing --local-dir FOLDER" in found.next_step


def test_doctor_mends_a_tokenizer_that_is_missing_or_lacks_a_kept_token(settings, tmp_path):
    bare = make_model(tmp_path / "bare")
    findings = examine(settings(teacher__model=str(bare)))
    assert f"no tokenizer can be loaded from {bare}: " in mended("tokenizer", findings).found
    assert verdicts("weights", findings) == ["ok"]
    found = mended("tokenizer", examine(settings(keep__always=["<|eot|>"])))
    assert found.found == "keep.always: the tokenizer has no token '<|eot|>'"


def test_doctor_mends_data_that_is_missing_or_of_no_known_form(settings, tmp_path):
    found = mended("data", examine(settings(data__files=[str(tmp_path / "none.jsonl")])))
    assert "none.jsonl does not exist" in found.found
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"x": 1}, *chat_records(1)])
    assert "odd.jsonl:1: a record of no known form" in mended("data", examine(settings(data__files=[str(odd)]))).found
    skipping = examine(settings(data__files=[str(odd)], data__on_bad_record="skip"))
    assert "odd.jsonl:2 is chat (messages)" in of("data", skipping)[0].found
    assert "data.source_field" in mended("data", examine(settings(data__source_field="where"))).found


def test_doctor_makes_a_row_of_the_first_record(settings, tmp_path):
    found = mended("data", examine(settings(data__max_tokens=3)))
    assert "max_tokens is 3" in found.found
    findings = examine(settings(data__max_tokens=3, data__on_too_long="drop"))
    assert verdicts("data", findings) == ["ok", "warning"]
    ids = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [1, 307], "label_mask": [0, 1]}])
    make_tokenizer(tmp_path / "large", vocab_size=310)
    found = mended("data", examine(settings(data__files=[str(ids)], teacher__tokenizer=str(tmp_path / "large"))))
    assert found.found == "the first record has id 307, but the teacher's vocabulary ends at 307"


def test_doctor_compares_free_disk_with_what_the_text_may_become(settings, monkeypatch, tmp_path):
    def with_free(num_bytes: int, **changes) -> list[Finding]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, num_bytes))
        return examine(settings(**changes))

    assert mended("disk", with_free(100 << 20)).found.endswith("out: 100.0 MiB free")
    assert verdicts("disk", with_free(400 << 20)) == ["ok"]
    long = tmp_path / "long.jsonl"
    shutil.copy(settings().data.files[0], long)
    os.truncate(long, 64 << 20)  # its end is zeros, which nobody reads here
    assert verdicts("disk", with_free(400 << 20, data__files=[str(long)])) == ["warning"]
    assert verdicts("disk", with_free(4 << 30, data__files=[str(long)])) == ["ok"]


def test_doctor_mends_an_output_that_cannot_be_made_or_is_not_ours(settings, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    found = mended("output", examine(settings(output=file / "below" / "out")))
    assert found.found == f"output {file}/below/out cannot be made: {file} is not a folder"
    assert file.read_text() == "mine"
    found = mended("output", examine(settings(output=tmp_path)))
    assert "is not empty and holds none of" in found.found
    assert os.listdir(tmp_path) == ["file"]


def test_doctor_tries_to_write_to_an_output_elsewhere_and_leaves_nothing(settings, tmp_path):
    findings = examine(settings().model_copy(update={"output": f"memory:/{tmp_path}/out"}))
    assert exit_code(findings) == 0
    (found,) = of("output", findings)
    assert found.found.startswith(f"1.0 MiB written to memory:/{tmp_path}/out in ")
    assert open_folder(f"memory:/{tmp_path}/out").files() == []
    open_folder(f"memory:/{tmp_path}/out").write("thesis.tex", b"x")
    found = mended("output", examine(settings().model_copy(update={"output": f"memory:/{tmp_path}/out"})))
    assert "is not empty and holds none of" in found.found
    found = mended("output", examine(settings().model_copy(update={"output": "s4://bucket/out"})))
    assert found.found == "s4://bucket/out: Protocol not known: s4"


def test_doctor_tries_an_output_that_is_there_and_leaves_it_as_it_is(settings, tmp_path):
    (tmp_path / "ours" / ".logitferry").mkdir(parents=True)
    findings = examine(settings(output=tmp_path / "ours"))
    assert exit_code(findings) == 0
    assert f"renamed in {tmp_path}/ours in " in of("output", findings)[-1].found
    assert os.listdir(tmp_path / "ours") == [".logitferry"]


def test_doctor_warns_of_a_slow_disk(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", lambda descriptor: time.sleep(0.13))  # of the file and of its folder
    (found,) = of("output", examine(settings()))
    assert found.verdict == "warning"
    assert os.listdir(tmp_path) == []


def test_doctor_mends_an_output_where_writing_fails(settings, monkeypatch, tmp_path):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in mended("output", examine(settings())).found
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("kind", "warned"), [("nfs4", True), ("lustre", True), ("fuse.sshfs", True), ("ext4", False)])
def test_doctor_says_where_the_output_lies_on_another_machine(settings, monkeypatch, tmp_path, kind, warned):
    place = tmp_path / "a mount"
    (place / "inside").mkdir(parents=True)
    mounts = tmp_path / "mounts"
    escaped = str(place).replace(" ", "\\040")
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nbox:/x {escaped} {kind} rw 0 0\nbox:/y {escaped}/in nfs rw 0 0\n")
    monkeypatch.setattr(output, "MOUNTS", mounts)
    findings = of("output", examine(settings(output=place / "inside" / "out")))
    assert [finding.verdict for finding in findings] == ["warning"] * warned + ["ok"]
    assert not warned or findings[0].found == f"{place}/inside is {kind} (box:/x), which mostly is over a network"
