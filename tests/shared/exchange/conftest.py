"""The command in this process."""

import sys

import pytest

from shared import logit_shards


@pytest.fixture
def command(capsys):
    """Run `logit-shards`: exit code, standard output, standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        before, sys.argv = sys.argv, ["logit-shards", *map(str, arguments)]
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                logit_shards.main()
        finally:
            sys.argv = before
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return run
