"""Scripts beside the library: docstrings as Markdown, a demo's figures in the pages, and the notes of a release."""
