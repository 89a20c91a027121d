"""A dataset repository on the Hugging Face Hub as the destination of a push: `hf://datasets/ORG/NAME[@BRANCH]`.

By `HfApi`, not by its file system for fsspec, which makes a commit of every file.  Contents are uploaded one by one
ahead of the commit that names them (`preupload_lfs_files`): the Hub knows them by their digest, so an upload that was
interrupted goes on where it was.  A commit shows as a whole, so a dataset of up to COMMIT_FILES files appears, or
takes another one's place, at once; of a larger one the manifest comes with the last commit.

The Hub says a digest of every file (sha256 of what it stores as LFS, git's of the rest), so what arrived is compared
without reading it back.  Reading goes through fsspec, as for any URL.
"""

import hashlib
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from shared.destination import SEND_AGAIN, is_hidden
from shared.errors import ConfigError, DamagedDataError, MismatchError
from shared.files import sha256_of_bytes
from shared.folders import open_folder, told

logger = logging.getLogger("logitferry")

HUB_URL = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<branch>[^/]+))?/?")
COMMIT_FILES = 100
"""The Hub advises 50 to 100 in one commit."""
MESSAGE = "logit-shards push"
PARENT_IS_ANOTHER = 412
"""HTTP status of a commit whose parent is no longer the branch's last."""


class HubDestination:
    """See `Destination`.  Making one makes the repository, where there is none."""

    def __init__(self, url: str, *, public: bool) -> None:
        """Raises ConfigError for another URL, or without the package; MismatchError where the repository is public."""
        found = HUB_URL.fullmatch(url)
        if found is None:
            raise ConfigError(
                f"{url}: a dataset is pushed to a repository of its own, and not below it",
                next_step="logit-shards push DATASET hf://datasets/ORG/NAME",
            )
        self.name = url.rstrip("/")
        self._repo, self._branch = found["repo"], found["branch"]
        with told(self.name):
            import huggingface_hub
            from huggingface_hub.hf_api import RepoFile
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()  # there is one of ours
            self._hub: Any = huggingface_hub
            self._file = RepoFile
            self._api = huggingface_hub.HfApi()
            self._api.create_repo(self._repo, repo_type="dataset", private=not public, exist_ok=True)
            info = self._api.repo_info(self._repo, repo_type="dataset", revision=self._branch)
        self._head: str | None = info.sha
        """The commit that was looked at, or made since: nothing is committed onto another."""
        if not info.private and not public:
            raise MismatchError(
                f"{self.name} is public: everybody would see the dataset",
                next_step="--public says that this is meant; else make the repository private, or take another name",
            )
        if info.private and public:
            logger.warning("%s was there and stays private; its settings on the Hub change that", self.name)
        self._there = self._digests(self._head)
        self._waiting: dict[str, Any] = {}
        self._sent: dict[str, set[str]] = {}

    def claim(self, folder: Path) -> None:
        pass  # the repository is there since this was made

    def paths(self) -> set[str]:
        return {path for path in self._there if not is_hidden(path)}

    def has_dump(self) -> bool:
        return False

    def read(self, path: str) -> bytes:
        return open_folder(self.name).read(path)

    def holds(self, path: str, data: bytes) -> bool:
        return self._there.get(path) in digests_of(data)

    def put(self, path: str, data: bytes) -> None:
        addition = self._hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=data)
        with told(f"{self.name}/{path}"):
            self._api.preupload_lfs_files(self._repo, [addition], repo_type="dataset", revision=self._branch)
        self._sent[path] = digests_of(data)
        self._waiting[path] = addition
        if len(self._waiting) >= COMMIT_FILES:
            self._commit()

    def remove(self, paths: Collection[str]) -> None:
        for path in paths:
            self._waiting[path] = self._hub.CommitOperationDelete(path_in_repo=path)

    def settle(self) -> None:
        revision = self._commit()
        if not self._sent:
            return
        there = self._digests(revision)
        for path, digests in self._sent.items():
            if there.get(path) not in digests:
                said = there.get(path, "that it has no such file")
                raise DamagedDataError(
                    f"{self.name}/{path}: the Hub says {said}, expected one of {', '.join(sorted(digests))}",
                    next_step=SEND_AGAIN,
                )

    def _commit(self) -> str | None:
        """The commit that was made, where there was something to commit."""
        if not self._waiting:
            return None
        with told(self.name):
            try:
                made = self._api.create_commit(
                    self._repo,
                    list(self._waiting.values()),
                    commit_message=MESSAGE,
                    repo_type="dataset",
                    revision=self._branch,
                    parent_commit=self._head,
                )
            except self._hub.errors.HfHubHTTPError as error:
                if error.response.status_code != PARENT_IS_ANOTHER:
                    raise
                raise MismatchError(
                    f"{self.name}: somebody else has changed it since it was looked at",
                    next_step="run the same command again, which looks at what is there now",
                ) from error
        self._waiting.clear()
        self._head = made.oid
        return made.oid

    def _digests(self, revision: str | None) -> dict[str, str]:
        """The digest of each file, as the Hub has it."""
        with told(self.name):
            tree = self._api.list_repo_tree(
                self._repo, recursive=True, repo_type="dataset", revision=revision or self._branch
            )
            files = [entry for entry in tree if isinstance(entry, self._file)]
            return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def digests_of(data: bytes) -> set[str]:
    """Those by which the Hub may know a content: sha256, and the SHA-1 of it as a blob of git."""
    return {sha256_of_bytes(data), hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()}
