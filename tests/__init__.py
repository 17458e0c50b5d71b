"""The test suite. A package, because some libraries install a package of this name that would be found instead."""
