"""Measures replies: what the panel, the log and the comparison show."""
