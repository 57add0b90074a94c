"""A gallery of held-out pairs, shared by the tests of pages and galleries."""

import pytest

from clip_jax.reports.gallery import Gallery
from tests.reports.runs import shapes_gallery


@pytest.fixture(scope="session")
def gallery() -> Gallery:
    return shapes_gallery()
