"""install.py as on another platform, or with steps that fail: python install_as.py PLATFORM ARGUMENT...

For the tests alone. SHARDED_KV_TEST_BREAKS names a function of Python's, as "os.replace": each call of it does its
work, and then says that it could not.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Any


def break_calls(name: str) -> None:
    """Have each call of a function fail when its work is done."""
    module_name, function_name = name.rsplit(".", 1)
    module = importlib.import_module(module_name)
    function = getattr(module, function_name)

    def broken(*arguments: Any, **options: Any) -> None:
        function(*arguments, **options)
        raise OSError(errno.EIO, "made to fail")

    setattr(module, function_name, broken)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if "SHARDED_KV_TEST_BREAKS" in os.environ:
        break_calls(os.environ["SHARDED_KV_TEST_BREAKS"])

    import install
    from lib.install import platforms

    sys.exit(install.main(sys.argv[2:], {"linux": platforms.LINUX, "windows": platforms.WINDOWS}[sys.argv[1]]))
