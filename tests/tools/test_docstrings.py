"""Docstrings on the pages of the reference."""

from __future__ import annotations

import pytest

pytest.importorskip("griffe", reason="griffe is not installed (it comes with the docs extra's mkdocstrings)")

from tools.docstrings import markdown


def test_docstrings_become_markdown():
    text = markdown(
        "See :func:`lightning_rejuv.alpha.search.choose_alpha` or :class:`Verdict`.\n\n"
        "=====  =======\nkey    meaning\n=====  =======\n``a``  first,\n       and on\n``b``  other\n=====  =======\n\n"
        "    Example::\n        >>> 1 + 1\n        2\n\n    more"
    )
    assert (
        '<autoref identifier="lightning_rejuv.alpha.search.choose_alpha" optional><code>choose_alpha</code>'
        in text
    )
    assert "`Verdict`" in text
    assert "| key | meaning |\n| --- | --- |\n| ``a`` | first, and on |\n| ``b`` | other |" in text
    assert "    Examples:\n        ```pycon\n        >>> 1 + 1\n        2\n        ```\n\n    more" in text
