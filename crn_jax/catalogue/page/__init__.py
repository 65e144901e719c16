"""The web page of a catalogue: Gradio inside a FastAPI application. Needs the extra `serve`."""
