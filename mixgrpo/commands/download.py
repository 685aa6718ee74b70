"""``python -m mixgrpo download NAME ...``: models, reward models and prompts from Hugging Face."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from mixgrpo.downloads.items import ITEMS, DownloadError, check_disk, check_program, fetch


def run(arguments: Sequence[str]) -> int:
    """Fetches the named items in the order given; returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(_usage())
        return 0 if arguments else 2
    unknown = [name for name in arguments if name not in ITEMS]
    if unknown:
        return _complain(_unknown(unknown[0]), 2)
    names = list(dict.fromkeys(arguments))
    try:
        check_program()
        check_disk(ITEMS[name] for name in names)
        for name in names:
            print(f"{name}: {ITEMS[name].what}", flush=True)
            for warning in fetch(ITEMS[name]):
                print(f"warning: {warning}", file=sys.stderr)
            print(f"{name}: complete, in {', '.join(_folders(name))}", flush=True)
    except (DownloadError, ValueError, OSError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("interrupted; run the same command again to continue", 130)
    return 0


def _usage() -> str:
    rows = [
        f"  {name:<12} {item.gigabytes:5.1f} GB  {item.what}\n{'':25}-> {', '.join(_folders(name))}"
        for name, item in ITEMS.items()
    ]
    return "\n".join(
        [
            "usage: bash scripts/download_models.sh NAME ...",
            "Downloads the missing files of each NAME from Hugging Face; resumes if run again.",
            *rows,
        ]
    )


def _folders(name: str) -> list[str]:
    item = ITEMS[name]
    if item.finish:
        return list(item.brings)
    return list(dict.fromkeys(source.folder for source in item.sources))


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, ITEMS, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"there is no download named {name!r}{hint} Known: {', '.join(ITEMS)}"


def _complain(message: str, exit_code: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code
