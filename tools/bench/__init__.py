"""The benchmark: the table of accelerate issue 1394, measured on this machine. `__main__.py` is its command."""
