"""The environment passed to the hosts: this one, without variables of a single machine or login."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_OF_ONE_MACHINE = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|SHLVL|PWD|OLDPWD|_|HOSTNAME|HOST|MAIL|TMPDIR|TEMP|TMP|EDITOR|"
    r"DISPLAY|TERM|TERM_.*|COLORTERM|LS_COLORS|LINES|COLUMNS|PS1|BASH.*|TMUX.*|STY|WINDOW|"
    r"SSH_.*|XDG_.*|DBUS_.*|PDSH_.*|SLURM_.*|SUDO_.*|KRB5CCNAME|"
    r"RANK|LOCAL_RANK|GROUP_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*"
)
_SETTING = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)")


def forwarded(environment: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """The variables passed to every host; the environment overrides the settings file."""
    ours = {k: v for k, v in environment.items() if not _OF_ONE_MACHINE.fullmatch(k)}
    return {**settings, **ours}


def read_settings(path: Path) -> dict[str, str]:
    """The NAME=VALUE lines of a file, without comments; a missing file sets nothing.

    Raises:
        ValueError: a line is neither a setting nor a comment.
    """
    settings = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        setting = _SETTING.fullmatch(text)
        if setting is None:
            raise ValueError(
                f"{path}, line {number}: {text.split('=')[0]!r} is not a setting; write "
                "NAME=VALUE, or # in front of a comment"
            )
        settings[setting["name"]] = setting["value"].strip()
    return settings
