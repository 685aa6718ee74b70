"""``python -m mixgrpo COMMAND``."""

from __future__ import annotations

import sys

from mixgrpo.commands import main

sys.exit(main())
