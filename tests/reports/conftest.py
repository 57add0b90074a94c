"""Held-out pairs, for the tests of what shows them."""

import pytest

from clip_jax.reports.page import Gallery
from tests.reports.runs import shapes_gallery


@pytest.fixture(scope="session")
def gallery() -> Gallery:
    return shapes_gallery()
