from __future__ import annotations

import pytest

from tests.conftest import shifted, tiny_llama


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def tuned(llama):
    return shifted(llama, 0.1)
