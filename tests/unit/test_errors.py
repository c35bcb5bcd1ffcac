import pytest

from p2pcache.core.errors import (
    BlobUnavailable,
    IntegrityError,
    SourceLacksBlob,
    SourceRefused,
    SourceUnavailable,
)

LACKS, REFUSED = SourceLacksBlob("a", "404"), SourceRefused("b", "403")
FAILED, LIED = SourceUnavailable("c", "503"), IntegrityError("d", "wrong")


@pytest.mark.parametrize(
    ("failures", "missing"),
    [
        ((LACKS,), True),
        ((LACKS, REFUSED), True),
        ((LACKS, FAILED), False),
        ((LIED,), False),
        ((), False),
    ],
)
def test_a_blob_is_missing_only_if_every_source_asked_says_so_for_good(failures, missing):
    error = BlobUnavailable.because("x", *failures)
    assert error.missing is missing
    assert all(str(failure) in str(error) for failure in failures)
