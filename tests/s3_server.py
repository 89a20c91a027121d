"""A real S3 server process, spoken to over HTTP, its bucket, and work that is killed between two requests."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from shared.folders import RemoteFolder
from tests.killed import Steps


class Store:
    """A bucket, looked at without the library that writes to it."""

    def __init__(self) -> None:
        import boto3

        self.client = boto3.client("s3")
        self.client.create_bucket(Bucket="bucket")

    def files(self, prefix: str) -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=f"{prefix}/")
        found: dict[str, bytes] = {}
        for key in [item["Key"] for page in pages for item in page.get("Contents", [])]:
            with suppress(self.client.exceptions.NoSuchKey):  # removed since it was listed
                found[key[len(prefix) + 1 :]] = self.client.get_object(Bucket="bucket", Key=key)["Body"].read()
        return found

    def open_uploads(self) -> list[str]:
        return [each["Key"] for each in self.client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])]


@contextmanager
def s3_server() -> Iterator[Store]:
    """What is in the environment until the end leads every S3 client there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            deadline = time.monotonic() + 60
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
            yield Store()
    finally:
        server.kill()
        server.wait()


@contextmanager
def traced_requests(steps: Steps) -> Iterator[None]:
    """A step lies before and after everything that changes the store."""
    write, remove = RemoteFolder.write, RemoteFolder.remove

    def write_traced(self: RemoteFolder, path: str, data: Any) -> None:
        with steps.around(f"write {path}"):
            write(self, path, data)

    def remove_traced(self: RemoteFolder, path: str) -> None:
        with steps.around(f"remove {path}"):
            remove(self, path)

    RemoteFolder.write, RemoteFolder.remove = write_traced, remove_traced  # type: ignore[method-assign]
    try:
        yield
    finally:
        RemoteFolder.write, RemoteFolder.remove = write, remove  # type: ignore[method-assign]
