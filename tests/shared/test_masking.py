"""Secrets are refused in URLs and hidden in what libraries say."""

import logging
import sys
import traceback

import click
import pytest
from click.testing import CliRunner

from shared.cli import run_command
from shared.errors import ConfigError
from shared.folders import told
from shared.logit_shards import cli
from shared.masking import masked, require_no_secret

SECRET = "wJalrXUtn/EMI+K7MDENG"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/dump",
        f"sftp://me:{SECRET}@host/dump",
        f"https://host/dump?token={SECRET}",
        f"https://host/dump?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
        f"simplecache::s3://k:{SECRET}@bucket/dump",
        f"https://{SECRET.replace('/', '')}@host/dump",
        f"https://host/dump?password={SECRET}",
        f"https://host/dump?X-Api-Key={SECRET}",
        f"https://host/dump%3Fto%6Ben%3D{SECRET}",
        f"ftp://me%3A{SECRET}@host/dump",
    ],
)
@pytest.mark.parametrize("command", [["info"], ["verify"], ["pull", "{url}", "out"], ["push", "made", "{url}"]])
def test_a_url_with_a_secret_is_refused_and_not_repeated(url: str, command: list[str]):
    arguments = [each.format(url=url) for each in command]
    result = CliRunner().invoke(cli, arguments if len(command) > 1 else [*command, url])
    assert isinstance(result.exception, ConfigError) or "made" in str(result.exception)
    told = result.output + "".join(traceback.format_exception(result.exception))
    assert SECRET not in told
    assert SECRET.replace("/", "") not in told
    with pytest.raises(ConfigError, match="has a key or password in it"):
        require_no_secret(url)


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/org/name@main", "s3://bucket/2026-01-01T10:00@home", "http://host:8080/a@b", "sftp://me@host/x",
        "memory://a", "/a:b@c", "https://host/x?version=2", "hf://datasets/org/name@refs%2Fpr%2F1",
    ],
)  # fmt: skip
def test_other_urls_are_taken(url: str):
    require_no_secret(url)


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MY_TOKEN", "1")
    monkeypatch.setenv("LONGER_TOKEN", "hf_abcdefgh-and-more")
    assert masked("hf_abcdefgh-and-more") == "***", "also what follows a secret that another begins with"
    text = f"401 for Bearer hf_abcdefgh at http://h/x?X-Amz-Signature=123abc&n=1 and s3://k:{SECRET}@b, {SECRET}"
    assert masked("at http://h/wJalrXUtn%2FEMI%2BK7MDENG/x") == "at http://h/***/x"
    assert masked(text) == "401 for Bearer *** at http://h/x?X-Amz-Signature=***&n=1 and s3://***@b, ***"


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_what_a_library_says_is_cleaned(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    with pytest.raises(Exception, match=r"\*\*\*") as raised, told("hf://datasets/a/b"):
        raise error("sent hf_abcdefgh")
    assert "hf_abcdefgh" not in str(raised.value)


def test_what_a_library_logs_is_cleaned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Such as the signed URL of an upload that is tried again."""
    library = logging.getLogger("some.library")
    handler = logging.StreamHandler(sys.stderr)

    @click.command()
    def work() -> None:
        library.addHandler(handler)
        library.warning("PUT %s failed, %d%%", "https://h/x?X-Amz-Signature=123abc", 7)
        library.removeHandler(handler)
        raise RuntimeError("at https://h/x?X-Amz-Signature=123abc")

    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(sys, "argv", ["work"])
    with pytest.raises(SystemExit):
        run_command(work)
    said = capsys.readouterr().err
    assert said.startswith(
        "PUT https://h/x?X-Amz-Signature=*** failed, 7%\nerror: RuntimeError: at https://h/x?X-Amz-S"
    )
    assert "123abc" not in said
    assert logging.getLogRecordFactory() is factory


def test_what_a_library_logs_in_a_wrong_way_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    """Logging prints such a slip where somebody listens, and never raises it."""

    @click.command()
    def work() -> None:
        logging.getLogger("some.library").warning("%d of %s", "one")

    monkeypatch.setattr(sys, "argv", ["work"])
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with pytest.raises(SystemExit) as ended:
        run_command(work)
    assert ended.value.code == 0
