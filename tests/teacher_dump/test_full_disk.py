"""A disk that fills up in the middle of a dump, for real: a small tmpfs in a mount namespace of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.dataset import LogitDataset
from shared.verification import verify
from tests.data import dump_settings

ENTER = ["unshare", "--user", "--map-root-user", "--mount"]
SCRIPT = """
set -u
mount -t tmpfs -o size=$SIZE tmpfs "$MOUNT" || exit 99
"$PYTHON" -m teacher_dump run "$CONFIG" > "$LOG.1" 2>&1
echo "first run: $?"
ls "$MOUNT/out/data" | wc -l
ls -A "$MOUNT/out" | grep -c writing
ls "$MOUNT/out" | grep -c manifest
mount -o remount,size=64m "$MOUNT"
"$PYTHON" -m teacher_dump run "$CONFIG" > "$LOG.2" 2>&1
echo "second run: $?"
cp -r "$MOUNT/out" "$KEEP"
"""


@pytest.mark.cluster
@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*ENTER, "true"], capture_output=True, check=False).returncode != 0,
    reason="no mount namespaces here",
)
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    size_of_plan = 2 * sum(path.stat().st_size for path in (sealed.folder / "tokenizer").iterdir()) + 20_000
    shards = [shard.size_bytes for shard in sealed.manifest.shards]
    mount, config = tmp_path / "disk", tmp_path / "dump.json"
    mount.mkdir()
    config.write_text(dump_settings(teacher_folder, chats, mount / "out").model_dump_json())
    size = size_of_plan + shards[0] + 4096 * 8 + shards[1] // 2  # some shards fit, not all
    environment = {
        "SIZE": str(size), "MOUNT": str(mount), "PYTHON": sys.executable, "CONFIG": str(config),
        "LOG": str(tmp_path / "log"), "KEEP": str(tmp_path / "kept"),
    }  # fmt: skip
    ran = subprocess.run(
        [*ENTER, "sh", "-c", SCRIPT],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    first, num_shards, num_left, num_manifests, second = ran.stdout.split("\n")[:5]
    told = (tmp_path / "log.1").read_text()
    assert first == "first run: 1", told
    assert "cannot be written: No space left on device\n  next: make room, then run the same command again" in told
    assert 0 < int(num_shards) < len(shards)
    assert (int(num_left), int(num_manifests)) == (0, 0), "nothing half-written stays"
    assert second == "second run: 0", (tmp_path / "log.2").read_text()
    kept = LogitDataset.open(tmp_path / "kept")
    assert kept.manifest == sealed.manifest
    assert verify(kept, deep=True).faults == []
