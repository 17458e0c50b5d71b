"""The engine: reads where accelerate put a model's parts and runs it without needless transfers.

Knows torch and accelerate, and neither the webui nor Gradio.
"""
