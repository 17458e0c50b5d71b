"""How prompts are read: what is kept is not computed again, and the rest goes through the stages in chunks."""
