"""The extension inside text-generation-webui: knows the engine and Gradio, and alone imports the webui's modules."""
