"""What the end-to-end tests share: the built images, once per session."""

import pytest

from tests.e2e.images import Images, build_images
from tests.e2e.tools import build_stargzd, check_machine


@pytest.fixture(scope="session")
def images() -> Images:
    """The test images. Building them and the daemons takes two minutes, once per machine."""
    check_machine()
    for version in ("0.12", "0.18"):
        build_stargzd(version)
    return build_images()
