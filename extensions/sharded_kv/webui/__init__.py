"""The extension inside text-generation-webui. Knows the engine and Gradio, and alone imports the webui's `modules.*`."""
