"""The cache of a conversation: keys and values in buffers with room for tokens to come.

Needs a transformers with cache objects: import it only where `compat.has_cache_objects()`.
"""
