"""The real vLLM on the CPU writes what the transformers engine writes.  `make test-vllm` runs this file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

from shared.errors import LogitferryError
from student_train.rollout.run import run_rollout
from tests.student_train.rollout.test_run import KEEPS_ALL, files_of, replies_in
from tests.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.vllm

# vLLM's CPU attention wants heads of 32 numbers at least; a vocabulary of 307 is padded to 320 inside.
SHAPE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
ON_VLLM = {"engine": "vllm", "vllm": {"enforce_eager": True, "max_rows": 9}, "device": "auto", "batch_rows": 32}
NUM_DRAWS = 2000


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("student"), seed=1, **SHAPE)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def written(settings, student, tmp_path) -> Any:
    """Run a rollout of a name: all its replies by their sample ids."""

    def write(name: str, **changes: Any) -> dict[str, dict[str, Any]]:
        tree = {"student": {"model": str(student), "dtype": "float32"}, "output": str(tmp_path / name)}
        run_rollout(settings(**tree | changes))
        both = replies_in(str(tmp_path / name)) + replies_in(str(tmp_path / name), "dropped")
        return {each["sample_id"]: each for each in both}

    return write


def test_greedy_replies_are_those_of_the_transformers_engine(written):
    greedy = {"temperature": 0, "samples": 1, "max_new_tokens": 40}
    ours, theirs = written("ours", **greedy), written("theirs", **greedy, **ON_VLLM)
    assert len(ours) == 7
    for name, each in ours.items():
        assert theirs[name] == each | {"nll": pytest.approx(each["nll"], abs=1e-4)}


def test_a_reply_ends_where_the_transformers_engine_ends_it(written, student, tmp_path):
    """A token of some greedy replies made one that ends a sequence, which generation_config.json alone names."""
    greedy = {"temperature": 0, "samples": 1, "keep": KEEPS_ALL}
    free = [each["input_ids"][each["label_mask"].index(True) :] for each in written("free", **greedy).values()]
    ending_id = next(token for token in free[0][2:] if not all(token in ids for ids in free))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(student)
    model.generation_config.eos_token_id = [ending_id]
    model.save_pretrained(tmp_path / "ending")
    transformers.AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "ending")
    ending = {"student": {"model": str(tmp_path / "ending"), "dtype": "float32"}, **greedy}
    ours, theirs = written("ours", **ending), written("theirs", **ending, **ON_VLLM)
    assert {each["is_cut"] for each in ours.values()} == {True, False}
    for name, each in ours.items():
        assert theirs[name] == each | {"nll": pytest.approx(each["nll"], abs=1e-4)}


def test_sampled_replies_are_the_same_for_a_seed_whatever_else_is_under_way(written, tmp_path):
    sampled = {"samples": 3, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "keep": KEEPS_ALL}
    written("one", **sampled, **ON_VLLM)
    narrow = ON_VLLM | {"vllm": {"enforce_eager": True, "max_rows": 2}}
    again, other = written("two", **sampled, **narrow), written("three", **sampled, **narrow, seed=5)
    assert {each["reply"] for each in again.values()}.isdisjoint(each["reply"] for each in other.values())
    ids = [
        {each["sample_id"]: each["input_ids"] for each in replies_in(str(tmp_path / name))} for name in ("one", "two")
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) > 15


def test_draws_and_their_log_probabilities_are_the_models(written, student):
    """Of one token, against the exact probabilities; what is drawn at T = 0.7 is told at T = 1."""
    one = {"samples": NUM_DRAWS, "rows": 1, "max_new_tokens": 1, "temperature": 0.7, "keep": KEEPS_ALL}
    replies = list(written("one", **one, **ON_VLLM | {"vllm": {"enforce_eager": True, "max_rows": 200}}).values())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(student)
    *prompt, _ = replies[0]["input_ids"]
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    p_V = (logits_V / 0.7).softmax(-1).numpy()
    drawn = [each["input_ids"][-1] for each in replies]
    random = np.random.default_rng(0)
    usual = max(np.abs(random.multinomial(NUM_DRAWS, p_V) / NUM_DRAWS - p_V).sum() / 2 for _ in range(400))
    assert np.abs(np.bincount(drawn, minlength=307) / NUM_DRAWS - p_V).sum() / 2 < usual
    nll_V = -logits_V.log_softmax(-1).numpy()
    np.testing.assert_allclose([each["nll"] for each in replies], nll_V[drawn], atol=1e-4)


def test_the_command_stops_and_goes_on_to_the_same_files(tree, student, tmp_path):
    """As the command does it, with nothing but the answer on standard output."""
    tree |= {"student": {"model": str(student), "dtype": "float32"}, "keep": KEEPS_ALL, **ON_VLLM}
    run_rollout_alone(tmp_path, tree | {"output": str(tmp_path / "whole")})
    first = run_rollout_alone(tmp_path, tree, "--worker", "0/2")
    assert first == {"finished": False, "units": 4, "units_done": 2}
    assert run_rollout_alone(tmp_path, tree)["finished"]
    assert {name: ids_of(text) for name, text in files_of(tree["output"]).items() if "part" in name} == {
        name: ids_of(text) for name, text in files_of(str(tmp_path / "whole")).items() if "part" in name
    }


def ids_of(text: bytes) -> list[list[int]]:
    return [json.loads(line)["input_ids"] for line in text.splitlines()]


def run_rollout_alone(tmp_path: Path, tree: dict[str, Any], *arguments: str) -> dict[str, Any]:
    (tmp_path / "rollout.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "student_train", "rollout", str(tmp_path / "rollout.yaml"), "--json", *arguments]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def test_what_vllm_refuses_is_said_in_its_words(written):
    with pytest.raises(
        LogitferryError, match=r"vLLM cannot start with .*no_such_method.*\n.*mend vllm, or set engine:"
    ):
        written("none", **ON_VLLM | {"vllm": {"quantization": "no_such_method"}})
