"""Scoring a dataset again: the same teacher agrees, another does not; differences are those of the definition."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from shared.dataset import LogitDataset
from shared.errors import MismatchError
from shared.rows import Positions
from teacher_dump.cli import cli
from teacher_dump.config import TeacherSettings
from teacher_dump.rescore import Rescored, _difference, require_agreement, rescore, teacher_of
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(23))


def dumped(teacher: Path, chats: Path, output: Path, **changes: Any) -> LogitDataset:
    return sealed_dump(dump_settings(teacher, chats, output, **changes))


def scored_again(dataset: LogitDataset, num_rows: int = 9, **changes: Any) -> Rescored:
    return rescore(dataset, TeacherSettings.model_validate(teacher_of(dataset) | changes), num_rows=num_rows)


def test_the_same_teacher_differs_by_rounding_alone(teacher_folder: Path, chats: Path, tmp_path: Path):
    exact = scored_again(dumped(teacher_folder, chats, tmp_path / "exact"))
    assert exact.rows == 9
    assert 0 < exact.stored.kl_largest < 1e-6
    assert exact.stored.kept_largest < 1e-4
    assert exact.control.kept_largest < 1e-4
    rounded_dataset = dumped(teacher_folder, chats, tmp_path / "rounded", keep__max_kl=1e-3)
    rounded = scored_again(rounded_dataset, num_rows=1000)
    assert rounded.rows == 23, "all there are"
    assert rounded.positions == rounded_dataset.manifest.total("positions")
    assert rounded.stored.kl_mean == pytest.approx(rounded_dataset.info()["mean_kl_nats"], rel=0.02)
    assert 0 < rounded.control.kl_largest < 1e-6, "scored beside other rows"
    require_agreement(rounded, "x")


def test_sampled_ids_are_compared_where_they_have_their_own_probability(
    teacher_folder: Path, chats: Path, tmp_path: Path
):
    changes = {"keep": {"method": "threshold", "tau": 0.02, "max_kl": 0}, "temperatures": [1]}
    found = scored_again(dumped(teacher_folder, chats, tmp_path / "out", **changes))
    assert found.stored.kl_mean is found.control.kl_mean is None
    assert 0 < found.stored.kept_largest < 1e-4
    assert found.stored.realised_largest < 1e-4
    require_agreement(found, "x")


def kl_by_definition(p: dict[int, float], q: dict[int, float]) -> float:
    """Over the ids of both and one lump."""
    common = p.keys() & q.keys()
    masses = [[np.exp(each[v]) for v in common] for each in (p, q)]
    p_all, q_all = ([*mass, 1 - sum(mass)] for mass in masses)
    return sum(a * np.log(a / b) for a, b in zip(p_all, q_all, strict=True))


def positions_of(logp_NV: torch.Tensor, k: int) -> tuple[Positions, list[dict[int, float]]]:
    ids = logp_NV.topk(k, dim=1).indices.sort(dim=1).values
    logp = logp_NV.gather(1, ids)
    rest = logp_NV.scatter(1, ids, -torch.inf)
    positions = Positions(
        kept_counts_P=np.full(len(ids), k, np.int32),
        kept_ids_E=ids.flatten().numpy().astype(np.int32),
        kept_logp_E=logp.flatten().numpy().astype(np.float32),
        realised_logp_P=logp_NV[:, 3].numpy().astype(np.float32),
        entropy_P=-(logp_NV.exp() * logp_NV).sum(1).numpy().astype(np.float32),
        tail_logsum_PT=torch.logsumexp(rest, 1)[:, None].numpy().astype(np.float32),
    )
    tables = [dict(zip(i.tolist(), p.tolist(), strict=True)) for i, p in zip(ids, logp, strict=True)]
    return positions, tables


def test_differences_are_those_of_the_definition():
    """Also where an id is kept on one side alone: it goes to the lump of the other."""
    torch.manual_seed(0)
    logits = torch.randn(7, 40, dtype=torch.float64) * 2
    one, p = positions_of(torch.log_softmax(logits, 1), 6)
    other, q = positions_of(torch.log_softmax(logits + torch.randn(7, 40), 1), 7)
    assert any(a.keys() - b.keys() for a, b in zip(p, q, strict=True)), "ids that the other does not keep"
    found = _difference([one], [other], None)
    kl = [kl_by_definition(a, b) for a, b in zip(p, q, strict=True)]
    assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-5)
    assert found.kl_largest == pytest.approx(max(kl), rel=1e-5)
    assert found.found == sum(len(a.keys() & b.keys()) for a, b in zip(p, q, strict=True)) / (6 * 7)
    kept = [abs(a[v] - b[v]) for a, b in zip(p, q, strict=True) for v in a.keys() & b.keys()]
    assert found.kept_mean == pytest.approx(np.mean(kept), rel=1e-5)
    assert found.kept_largest == pytest.approx(max(kept), rel=1e-5)
    realised = np.abs(one.realised_logp_P - other.realised_logp_P)
    assert (found.realised_mean, found.realised_largest) == pytest.approx((realised.mean(), realised.max()))


def test_another_checkpoint_is_refused_by_its_digest(teacher_folder: Path, chats: Path, tmp_path: Path):
    dataset = dumped(teacher_folder, chats, tmp_path / "out")
    other = make_model(tmp_path / "other", seed=5)
    make_tokenizer(other)
    with pytest.raises(MismatchError, match="is of a teacher with weights_sha256"):
        scored_again(dataset, model=str(other))


def test_a_dataset_that_says_something_else_than_its_teacher_is_found(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A shift by one, as a mistake in an engine would make it."""
    teacher = make_model(tmp_path / "teacher", seed=1)
    make_tokenizer(teacher)
    with monkeypatch.context() as patch:
        hidden_at_positions = "shared.batching.PaddedBatch.hidden_at_positions"
        patch.setattr(
            hidden_at_positions,
            lambda self, body: body(input_ids=self.input_ids_BL, use_cache=False).last_hidden_state[
                self.row_N, (self.source_N - 1).clamp(min=0)
            ],
        )
        dataset = dumped(teacher, chats, tmp_path / "out")
    found = scored_again(dataset)
    assert found.control.realised_largest < 1e-4
    assert found.stored.found < 0.8
    assert found.control.found == 1
    with pytest.raises(MismatchError, match="out: the KL between what is stored and the live teacher is"):
        require_agreement(found, "out")


def test_the_command_prints_both_columns_and_finds_a_moved_teacher(teacher_folder: Path, chats: Path, tmp_path: Path):
    dataset = dumped(teacher_folder, chats, tmp_path / "out")
    moved = tmp_path / "moved"
    tensors = load_file(teacher_folder / "model.safetensors")
    transformers.AutoConfig.from_pretrained(teacher_folder).save_pretrained(moved)
    (moved / "config.json").write_bytes((teacher_folder / "config.json").read_bytes())
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    (moved / "model.safetensors").write_bytes((teacher_folder / "model.safetensors").read_bytes())
    arguments = ["rescore", str(dataset.folder), "--rows", "4", "--set", f"teacher.model={moved}"]
    plain = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert plain.exit_code == 0
    lines = plain.stdout.splitlines()
    assert "scored twice by transformers" in lines[0]
    assert lines[-1].endswith("out: what is stored is what this teacher says; rounding explains the differences")
    assert [line.split("  ")[0] for line in lines[2:-1]] == [
        "|log p| realised token",
        "|log p| kept ids",
        "KL",
        "kept ids found",
    ]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert found["rows"] == 4
    assert found["stored"]["kl_largest"] < 1e-6
