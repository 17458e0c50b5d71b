#!/usr/bin/env python3
"""Puts the extension into a text-generation-webui, and takes it out again. `--help` says how.

The installer itself is lib/install/. This file is read by any Python, also by one that is too old for the rest.
"""

import os
import sys

if sys.version_info < (3, 8):  # noqa: UP036
    sys.exit(
        "install.py needs Python 3.8 or newer, and this is %d.%d (%s).\n"  # noqa: UP031
        "The webui's own will do: the python in its folder %s."
        % (sys.version_info[0], sys.version_info[1], sys.executable, os.path.join("installer_files", "env"))
    )

sys.dont_write_bytecode = True  # Nothing of a run stays in the clone.
sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # An isolated Python does not do that by itself.

from lib.install.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
