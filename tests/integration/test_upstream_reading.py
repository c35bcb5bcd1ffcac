"""Reading from a registry that works, and from one that does not."""

import asyncio
import json
import logging
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pcache.core.errors import (
    BadDigest,
    BadName,
    ConfigError,
    IntegrityError,
    SourceLacksBlob,
    SourceRefused,
    SourceUnavailable,
)
from p2pcache.core.model import Digest, Repository, Tag
from p2pcache.core.ranges import ByteRange
from p2pcache.upstream.client import MAX_MANIFEST_BYTES, Upstream
from p2pcache.upstream.endpoint import Patience, UpstreamConfig
from tests.fakes import (
    OCI_INDEX,
    OCI_MANIFEST,
    Answer,
    Chunked,
    Endless,
    FakeRegistry,
    FlipBit,
    Header,
    Hold,
    IgnoreRange,
    Narrow,
    Reset,
    Short,
    Stall,
    TestAuthority,
    Together,
)

DATA = bytes(range(251)) * 1000
SIZE = len(DATA)
QUICK = Patience(connect_s=2.0, headers_s=2.0, progress_s=2.0, total_s=10.0, pause_s=0.001)
IMPATIENT = replace(QUICK, connect_s=0.05, headers_s=0.05, progress_s=0.1)


@pytest.fixture
async def registry():
    async with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def blob(registry):
    return registry.add_blob("team/app", DATA)


@asynccontextmanager
async def reading_from(registry, patience=QUICK, **options):
    config = UpstreamConfig(
        endpoints={registry.address: registry.url}, patience=patience, **options
    )
    async with Upstream(config) as upstream:
        yield upstream


async def read(upstream, registry, blob, start=0, stop=SIZE, size=SIZE, **options):
    part = ByteRange(start, stop)
    async with aclosing(
        upstream.read(registry.repository("team/app"), blob, part, size, **options)
    ) as blocks:
        return b"".join([block async for block in blocks])


# Ranges.


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, SIZE), (SIZE - 1, SIZE), (7, 70_000)])
async def test_exactly_the_range_is_read(registry, blob, start, stop):
    async with reading_from(registry) as upstream:
        assert await read(upstream, registry, blob, start, stop) == DATA[start:stop]
    (access,) = registry.log
    assert access.range == f"bytes={start}-{stop - 1}"
    assert access.headers["Accept-Encoding"] == "identity"
    assert access.bytes_sent == stop - start


async def test_the_connection_is_used_again(registry, blob):
    async with reading_from(registry) as upstream:
        for start in range(0, 1000, 100):
            await read(upstream, registry, blob, start, start + 100)
        await upstream.blob_size(registry.repository("team/app"), blob)
    assert registry.connections == 1


async def test_the_connection_is_used_again_by_who_stops_at_the_last_byte(registry, blob):
    async with reading_from(registry) as upstream:
        for _ in range(3):
            part, got = ByteRange(0, 100), 0
            async with aclosing(
                upstream.read(registry.repository("team/app"), blob, part, SIZE)
            ) as blocks:
                async for block in blocks:
                    got += len(block)
                    if got == len(part):
                        break
    assert registry.connections == 1


async def test_who_stops_early_ends_the_request(registry, blob):
    registry.inject(Stall(after=1000))
    async with reading_from(registry) as upstream:
        async with aclosing(
            upstream.read(registry.repository("team/app"), blob, ByteRange(0, SIZE), SIZE)
        ) as blocks:
            assert DATA.startswith(await anext(blocks))
        # The place in the queue is free again, too.
        assert await read(upstream, registry, blob, 0, 10) == DATA[:10]


async def test_a_reader_that_is_cancelled_leaves_nothing_behind(registry, blob):
    registry.inject(Stall(after=1000))
    async with reading_from(registry, connections_per_registry=1) as upstream:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await read(upstream, registry, blob)
        assert await read(upstream, registry, blob, 0, 10) == DATA[:10]


async def test_a_shorter_answer_is_followed_by_another_request(registry, blob):
    registry.inject(Narrow(1000))
    async with reading_from(registry) as upstream:
        assert await read(upstream, registry, blob, 0, 3000) == DATA[:3000]
    assert [access.range for access in registry.log] == ["bytes=0-2999", "bytes=1000-2999"]


async def test_a_registry_without_ranges_is_skipped_through(registry, blob, caplog):
    registry.inject(IgnoreRange(), times=None)
    counted = []
    config = UpstreamConfig(endpoints={registry.address: registry.url}, patience=QUICK)
    async with Upstream(config, on_bytes=lambda name, n: counted.append((name, n))) as upstream:
        for _ in range(2):
            got = await read(upstream, registry, blob, 100_000, 100_100)
            assert got == DATA[100_000:100_100]
    assert {name for name, _ in counted} == {registry.address}
    assert sum(n for _, n in counted) >= 2 * 100_100, "bytes read in vain count"
    assert [r.message for r in caplog.records].count("upstream.range_ignored") == 1


@pytest.mark.parametrize("chunked", [False, True])
async def test_the_end_is_read_without_ranges_too(registry, blob, chunked):
    registry.inject(IgnoreRange(chunked=chunked), times=None)
    async with reading_from(registry) as upstream:
        assert await read(upstream, registry, blob, SIZE - 5, SIZE) == DATA[-5:]
        assert await read(upstream, registry, blob, 0, SIZE) == DATA


@pytest.mark.parametrize("fault", [Short(1000), Reset(1000)])
async def test_a_broken_body_is_resumed_at_the_byte_reached(registry, blob, fault):
    broken = registry.inject(fault, times=2)
    async with reading_from(registry) as upstream:
        assert await read(upstream, registry, blob) == DATA
    assert broken.hits == 2
    first, second, third = registry.log
    assert first.range == f"bytes=0-{SIZE - 1}"
    # After a reset the bytes that were under way may be lost.
    assert 0 <= int(second.range[6:].split("-")[0]) <= 1000
    assert int(third.range[6:].split("-")[0]) <= 2000
    if isinstance(fault, Short):
        assert [second.range, third.range] == [f"bytes=1000-{SIZE - 1}", f"bytes=2000-{SIZE - 1}"]


async def test_a_stalled_body_is_resumed(registry, blob):
    registry.inject(Stall(after=1000))
    async with reading_from(registry, IMPATIENT) as upstream:
        assert await read(upstream, registry, blob) == DATA
    assert registry.log[1].range == f"bytes=1000-{SIZE - 1}"


async def test_a_body_that_always_breaks_is_given_up(registry, blob):
    registry.inject(Short(100), times=None)
    async with reading_from(registry) as upstream:
        with pytest.raises(SourceUnavailable, match="body"):
            await read(upstream, registry, blob)
    assert len(registry.log) == 3


async def test_a_body_that_ends_too_soon_is_given_up(registry, blob):
    registry.inject(Together((Answer(200, {}, b"short"), Chunked())), times=None)
    async with reading_from(registry) as upstream:
        with pytest.raises(SourceUnavailable, match="body ended 95 bytes early"):
            await read(upstream, registry, blob, 0, 100, deadline_s=5.0)
    assert len(registry.log) == 3


async def test_progress_is_worth_more_tries(registry):
    data = DATA * 40
    blob = registry.add_blob("team/app", data)
    registry.inject(Short(2 << 20), times=None, when=lambda a: not a.range.startswith("bytes=8"))
    async with reading_from(registry) as upstream:
        got = await read(upstream, registry, blob, 0, len(data), len(data))
    assert got == data
    assert len(registry.log) > 3


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, SIZE - 1),
    st.integers(1, SIZE),
    st.lists(
        st.sampled_from([Short(0), Short(777), Short(-1), Reset(70_000), Narrow(500)])
        | st.sampled_from([IgnoreRange(), IgnoreRange(chunked=True), Chunked(), Answer(502)]),
        max_size=2,
    ),
)
def test_no_two_faults_change_the_bytes(start, length, faults):
    async def check():
        async with FakeRegistry() as registry:
            blob = registry.add_blob("team/app", DATA)
            for fault in faults:
                registry.inject(fault)
            stop = min(start + length, SIZE)
            async with reading_from(registry) as upstream:
                assert await read(upstream, registry, blob, start, stop) == DATA[start:stop]

    asyncio.run(check())


@pytest.mark.parametrize(
    "fault",
    [
        Header("Content-Range", f"bytes 1-10/{SIZE}"),
        Header("Content-Range", f"bytes 0-99/{SIZE + 1}"),
        Header("Content-Range", "bytes 0-99/*"),
        Header("Content-Range", None),
        Header("Content-Range", f"bytes 0-100/{SIZE}"),
        Chunked(extra=b"x"),
        Endless(),
        Answer(416),
        Answer(200, {}, b"another blob"),
    ],
)
async def test_an_answer_that_contradicts_itself_is_a_lie(registry, blob, fault):
    registry.inject(fault, times=None)
    async with reading_from(registry) as upstream:
        with pytest.raises(IntegrityError):
            await read(upstream, registry, blob, 0, 100)
    assert len(registry.log) == 1, "a liar is not asked again"


async def test_bytes_are_not_proven_here(registry, blob):
    registry.inject(FlipBit(3))
    async with reading_from(registry) as upstream:
        got = await read(upstream, registry, blob, 0, 10)
    assert got == bytes([0, 1, 2, 3 ^ 1, 4, 5, 6, 7, 8, 9])


async def test_a_range_past_the_end_is_the_callers_mistake(registry, blob):
    async with reading_from(registry) as upstream:
        with pytest.raises(ValueError, match="reaches past"):
            await read(upstream, registry, blob, 0, SIZE + 1)


# Failing.


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, SourceLacksBlob),
        (410, SourceLacksBlob),
        (401, SourceRefused),
        (403, SourceRefused),
        (451, SourceRefused),
        (204, SourceUnavailable),
        (429, SourceUnavailable),
        (500, SourceUnavailable),
        (503, SourceUnavailable),
    ],
)
async def test_a_status_says_what_to_do_next(registry, blob, status, error):
    registry.inject(Answer(status), times=None)
    async with reading_from(registry) as upstream:
        with pytest.raises(error) as caught:
            await read(upstream, registry, blob, 0, 10)
    assert caught.value.source == f"upstream {registry.address}"
    assert len(registry.log) == (3 if error is SourceUnavailable else 1)


@pytest.mark.parametrize("fault", [Answer(503), Answer(429), Short(-1), Reset(-1)])
async def test_what_fails_once_is_tried_again(registry, blob, fault):
    registry.inject(fault, times=2)
    async with reading_from(registry) as upstream:
        assert await read(upstream, registry, blob, 0, 10) == DATA[:10]


async def test_silence_is_a_failure(registry, blob):
    registry.inject(Stall(-1))
    async with reading_from(registry, IMPATIENT) as upstream:
        assert await read(upstream, registry, blob, 0, 10) == DATA[:10]


async def test_the_deadline_ends_all_tries(registry, blob):
    registry.inject(Stall(-1), times=None)
    async with reading_from(registry) as upstream:
        with pytest.raises(SourceUnavailable):
            await read(upstream, registry, blob, 0, 10, deadline_s=0.05)
        with pytest.raises(SourceUnavailable):
            await upstream.blob_size(registry.repository("team/app"), blob, deadline_s=0.0)
    assert len(registry.log) == 1


async def test_a_trickle_is_too_slow(registry, blob):
    registry.bytes_per_s = 1e6
    async with reading_from(registry) as upstream:
        with pytest.raises(SourceUnavailable, match=r"too slow|no answer in time"):
            await read(upstream, registry, blob, deadline_s=0.1)
    assert len(registry.log) == 1


async def test_a_place_in_the_queue_is_waited_for_no_longer_than_allowed(registry, blob):
    registry.inject(Hold(asyncio.Event()))
    async with (
        reading_from(registry, connections_per_registry=1) as upstream,
        asyncio.TaskGroup() as tasks,
    ):
        held = tasks.create_task(read(upstream, registry, blob, 0, 10))
        await registry.arrived(1)
        with pytest.raises(SourceUnavailable, match="waiting for a connection"):
            await read(upstream, registry, blob, 0, 10, deadline_s=0.01)
        held.cancel()


async def test_nobody_listening_is_a_failure(registry, blob):
    repository = Repository.parse("127.0.0.1:1", "team/app")
    async with Upstream(UpstreamConfig(patience=QUICK)) as upstream:
        with pytest.raises(SourceUnavailable, match="cannot connect"):
            await upstream.blob_size(repository, blob)


async def test_a_name_that_cannot_be_a_host_is_refused(blob):
    async with Upstream(UpstreamConfig(patience=QUICK)) as upstream:
        with pytest.raises(SourceRefused):
            await upstream.blob_size(Repository.parse("r.example:99999", "app"), blob)


async def test_a_long_wait_is_told_and_kept(registry, blob):
    registry.inject(Answer(429, {"Retry-After": "600"}))
    async with reading_from(registry) as upstream:
        with pytest.raises(SourceUnavailable) as caught:
            await read(upstream, registry, blob, 0, 10)
        assert caught.value.retry_after_s == 600
        with pytest.raises(SourceUnavailable) as caught:
            await upstream.blob_size(registry.repository("team/app"), blob)
        assert 590 < (caught.value.retry_after_s or 0.0) <= 600
    assert len(registry.log) == 1, "it was not asked again"


async def test_a_short_wait_is_waited_for(registry, blob):
    registry.inject(Answer(503, {"Retry-After": "1"}))
    async with reading_from(registry) as upstream:
        assert await read(upstream, registry, blob, 0, 10) == DATA[:10]


async def test_a_registry_that_keeps_failing_is_left_alone(registry, blob):
    registry.inject(Answer(500), times=None)
    async with reading_from(registry) as upstream:
        for _ in range(10):
            with pytest.raises(SourceUnavailable):
                await read(upstream, registry, blob, 0, 10)
    assert len(registry.log) == 6


async def test_requests_to_one_registry_are_bounded(registry, blob):
    released = asyncio.Event()
    registry.inject(Hold(released), times=None)
    async with (
        reading_from(registry, connections_per_registry=2, waiting_per_registry=3) as upstream,
        asyncio.TaskGroup() as tasks,
    ):
        reads = [tasks.create_task(read(upstream, registry, blob, 0, 10)) for _ in range(5)]
        await registry.arrived(2)
        with pytest.raises(SourceUnavailable, match="waiting"):
            await read(upstream, registry, blob, 0, 10)
        with pytest.raises(SourceUnavailable):
            await upstream.blob_size(registry.repository("team/app"), blob)
        assert len(registry.log) == 2
        released.set()
    assert [task.result() for task in reads] == [DATA[:10]] * 5


# Manifests.

MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()


@pytest.fixture
def image(registry):
    return registry.add_manifest("team/app", OCI_MANIFEST, MANIFEST, "v1")


async def test_a_manifest_is_read_by_digest_and_by_tag(registry, image):
    repository = registry.repository("team/app")
    async with reading_from(registry) as upstream:
        by_digest = await upstream.manifest(repository, image, [OCI_MANIFEST, OCI_INDEX])
        by_tag = await upstream.manifest(repository, Tag("v1"), [OCI_MANIFEST])
    assert by_digest == by_tag
    assert (by_tag.digest, by_tag.media_type, by_tag.data) == (image, OCI_MANIFEST, MANIFEST)
    assert registry.log[0].headers["Accept"] == f"{OCI_MANIFEST}, {OCI_INDEX}"


async def test_a_manifest_without_a_digest_header_is_named_by_its_bytes(registry, image):
    registry.inject(Header("Docker-Content-Digest", "md5:no"))
    async with reading_from(registry) as upstream:
        found = await upstream.manifest(registry.repository("team/app"), Tag("v1"), [])
    assert found.digest == image


@pytest.mark.parametrize("reference", [Tag("v1"), Digest.of(MANIFEST)])
@pytest.mark.parametrize(
    "fault",
    [
        FlipBit(3),
        Endless(),
        Header("Content-Type", ""),
        Header("Content-Encoding", "gzip"),
        Answer(200, {"Content-Type": "x/y"}, b" " * (MAX_MANIFEST_BYTES + 1)),
    ],
)
async def test_a_wrong_manifest_is_refused(registry, image, reference, fault):
    registry.inject(fault)
    async with reading_from(registry) as upstream:
        with pytest.raises(IntegrityError):
            await upstream.manifest(registry.repository("team/app"), reference, [])


@pytest.mark.parametrize("fault", [Short(5), Reset(5), Answer(502)])
async def test_a_broken_manifest_is_read_again(registry, image, fault):
    registry.inject(fault)
    async with reading_from(registry) as upstream:
        found = await upstream.manifest(registry.repository("team/app"), image, [])
    assert found.data == MANIFEST


async def test_a_tag_is_resolved_without_its_manifest(registry, image):
    async with reading_from(registry) as upstream:
        found = await upstream.resolve(registry.repository("team/app"), Tag("v1"), [OCI_MANIFEST])
    assert (found.digest, found.media_type, found.size) == (image, OCI_MANIFEST, len(MANIFEST))
    assert [access.method for access in registry.log] == ["HEAD"]


@pytest.mark.parametrize(
    "fault",
    [Header("Docker-Content-Digest", None), Header("Content-Type", ""), Answer(405), Answer(501)],
)
async def test_a_tag_is_resolved_by_its_manifest_if_need_be(registry, image, fault):
    registry.inject(fault, method="HEAD")
    async with reading_from(registry) as upstream:
        found = await upstream.resolve(registry.repository("team/app"), Tag("v1"), [OCI_MANIFEST])
    assert (found.digest, found.size) == (image, len(MANIFEST))
    assert [access.method for access in registry.log] == ["HEAD", "GET"]


async def test_an_unknown_tag_is_lacking(registry, image):
    async with reading_from(registry) as upstream:
        with pytest.raises(SourceLacksBlob):
            await upstream.resolve(registry.repository("team/app"), Tag("v2"), [])
        with pytest.raises(SourceLacksBlob):
            await upstream.manifest(registry.repository("team/app"), Digest.of(b"x"), [])


# Sizes.


async def test_a_size_is_asked_for_without_reading(registry, blob):
    async with reading_from(registry) as upstream:
        assert await upstream.blob_size(registry.repository("team/app"), blob) == SIZE
    assert [access.method for access in registry.log] == ["HEAD"]


@pytest.mark.parametrize("data", [DATA, b""])
async def test_a_size_is_read_from_a_range_if_need_be(registry, data):
    blob = registry.add_blob("team/app", data)
    registry.inject(Answer(405), method="HEAD")
    async with reading_from(registry) as upstream:
        assert await upstream.blob_size(registry.repository("team/app"), blob) == len(data)
    assert registry.log[1].range == "bytes=0-0"


async def test_a_size_is_told_by_a_registry_without_ranges(registry, blob):
    registry.inject(Answer(405), method="HEAD")
    registry.inject(IgnoreRange(), method="GET")
    async with reading_from(registry) as upstream:
        assert await upstream.blob_size(registry.repository("team/app"), blob) == SIZE


async def test_a_size_that_nobody_tells_is_an_error(registry, blob):
    registry.inject(Answer(405), method="HEAD")
    registry.inject(IgnoreRange(chunked=True), method="GET")
    async with reading_from(registry) as upstream:
        with pytest.raises(IntegrityError):
            await upstream.blob_size(registry.repository("team/app"), blob)


async def test_a_blob_that_is_not_there_has_no_size(registry, blob):
    async with reading_from(registry) as upstream:
        with pytest.raises(SourceLacksBlob):
            await upstream.blob_size(registry.repository("other"), blob)


# Lists.


async def test_tags_are_passed_on_page_by_page(registry):
    for tag in ("v1", "v2", "v3"):
        registry.add_manifest("team/app", OCI_MANIFEST, MANIFEST, tag)
    query = [("n", "2"), ("service", "not-for-the-registry")]
    async with reading_from(registry) as upstream:
        found = await upstream.forward(registry.repository("team/app"), "tags/list", query)
    assert found.status == 200
    assert json.loads(found.body) == {"name": "team/app", "tags": ["v1", "v2"]}
    assert found.headers["Link"] == '</v2/team/app/tags/list?n=2&last=v2>; rel="next"'
    assert found.headers["Content-Type"] == "application/json"
    assert registry.log[0].query == "n=2"


async def test_links_lead_to_the_mirror(registry):
    registry.add_manifest("team/app", OCI_MANIFEST, MANIFEST, "v1")
    link = f'<{registry.url}/v2/team/app/tags/list?last=v1>; rel="next"'
    registry.inject(Header("Link", link))
    async with reading_from(registry) as upstream:
        found = await upstream.forward(registry.repository("team/app"), "tags/list")
    assert found.headers["Link"] == '</v2/team/app/tags/list?last=v1>; rel="next"'


async def test_referrers_are_passed_on(registry, image):
    body = json.dumps({"subject": {"digest": str(image)}}).encode()
    signature = registry.add_manifest("team/app", OCI_MANIFEST, body)
    async with reading_from(registry) as upstream:
        found = await upstream.forward(
            registry.repository("team/app"), f"referrers/{image}", accept=[OCI_INDEX]
        )
    assert [entry["digest"] for entry in json.loads(found.body)["manifests"]] == [str(signature)]


async def test_a_list_that_is_not_there_is_an_answer(registry):
    async with reading_from(registry) as upstream:
        found = await upstream.forward(registry.repository("none"), "tags/list")
    assert found.status == 404
    assert json.loads(found.body)["errors"][0]["code"] == "NAME_UNKNOWN"


@pytest.mark.parametrize(
    "kind", ["", "blobs/x", "tags/list/", "referrers", "../x", "tags/list?n=1"]
)
async def test_nothing_else_is_passed_on(registry, kind):
    async with reading_from(registry) as upstream:
        with pytest.raises(BadName):
            await upstream.forward(registry.repository("team/app"), kind)
        with pytest.raises(BadDigest):
            await upstream.forward(registry.repository("team/app"), "referrers/../x")
    assert registry.log == []


async def test_a_list_is_asked_for_again_if_the_registry_fails(registry):
    registry.add_manifest("team/app", OCI_MANIFEST, MANIFEST, "v1")
    registry.inject(Answer(503))
    registry.inject(Header("Link", '<https://elsewhere.example/v2/x>; rel="next"'))
    async with reading_from(registry) as upstream:
        found = await upstream.forward(registry.repository("team/app"), "tags/list")
        registry.inject(Answer(403))
        with pytest.raises(SourceRefused):
            await upstream.forward(registry.repository("team/app"), "tags/list")
    assert found.headers["Link"].startswith("<https://elsewhere.example/")


async def test_an_endless_list_is_cut_off(registry):
    registry.inject(Endless())
    async with reading_from(registry) as upstream:
        with pytest.raises(IntegrityError):
            await upstream.forward(registry.repository("team/app"), "tags/list")


# TLS.


async def test_a_certificate_of_ones_own_must_be_named(tmp_path, caplog):
    authority = TestAuthority(tmp_path)
    async with FakeRegistry(tls=authority) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry, ca_file=authority.ca_file) as upstream:
            assert await read(upstream, registry, blob, 0, 10) == DATA[:10]
        async with reading_from(registry) as upstream:
            with pytest.raises(SourceUnavailable, match="certificate"):
                await read(upstream, registry, blob, 0, 10)
    assert len(registry.log) == 1


@pytest.mark.parametrize("text", [None, "no certificate"])
async def test_certificates_that_cannot_be_read_are_a_mistake(tmp_path, text):
    file = tmp_path / "ca.pem"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError):
        async with Upstream(UpstreamConfig(ca_file=file)):
            pass


async def test_every_answer_is_counted(registry, blob, image):
    registry.inject(Answer(502))
    statuses, counted = [], []
    config = UpstreamConfig(endpoints={registry.address: registry.url}, patience=QUICK)
    async with Upstream(
        config,
        on_bytes=lambda name, n: counted.append((name, n)),
        on_request=lambda name, status: statuses.append((name, status)),
    ) as upstream:
        await read(upstream, registry, blob, 0, 10)
        await upstream.manifest(registry.repository("team/app"), image, [])
    assert statuses == [(registry.address, status) for status in (502, 206, 200)]
    assert counted == [(registry.address, 10), (registry.address, len(MANIFEST))]


async def test_nothing_is_logged_above_debug_when_all_goes_well(registry, blob, caplog):
    caplog.set_level(logging.INFO, "p2pcache")
    async with reading_from(registry) as upstream:
        await read(upstream, registry, blob)
    assert [r for r in caplog.records if r.name.startswith("p2pcache")] == []
