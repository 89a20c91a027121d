"""Findings: how they are made of what goes wrong, and shown."""

import pytest

from shared.doctor.finding import Finding, exit_code, guarded, render
from shared.errors import ConfigError


def test_findings_are_shown_as_aligned_lines_with_what_to_do_below():
    findings = [
        Finding("a", "ok", "fine", "nobody needs this"),
        Finding("long name", "warning", "so\n  so", "look"),
        Finding("b", "mend", "broken", "mend it"),
    ]
    assert render(findings) == [
        "ok       a          fine",
        "warning  long name  so so",
        "  next: look",
        "mend     b          broken",
        "  next: mend it",
    ]
    assert [exit_code(findings), exit_code(findings[:2]), exit_code([])] == [1, 0, 0]


def test_guarded_takes_message_and_next_step_of_our_errors_and_lets_ctrl_c_through():
    def failing(error):
        raise error
        yield

    found = guarded("x", lambda: failing(ConfigError("no", next_step="do")))
    assert found == [Finding("x", "mend", "no", "do")]
    with pytest.raises(KeyboardInterrupt):
        guarded("x", lambda: failing(KeyboardInterrupt()))
