"""The installer: it puts the extension into a webui, and takes it out again. Standard library only, Python 3.8 on."""
