"""What the end-to-end tests share: the built images, once per session."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.images import Images, build_images
from tests.e2e.tools import STARGZ_VERSIONS, build_stargzd, check_machine


@pytest.fixture(scope="session")
def images() -> Images:
    """The test images. Building them and the daemons takes minutes, once per checkout."""
    check_machine()
    with ThreadPoolExecutor(1 + len(STARGZ_VERSIONS)) as pool:
        daemons = [pool.submit(build_stargzd, version) for version in STARGZ_VERSIONS]
        built = pool.submit(build_images)
        for daemon in daemons:
            daemon.result()
        return built.result()
