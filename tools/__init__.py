"""Scripts that make the documentation: docstrings as Markdown, and a demo's figures in the pages."""
