"""Getting in, and being sent elsewhere: tokens, passwords, helpers, redirects."""

import asyncio
import base64
import json
import logging
import os
import select
import stat
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from p2pcache.core.dockerconfig import IdentityToken, Password
from p2pcache.core.errors import SourceLacksBlob, SourceRefused, SourceUnavailable
from p2pcache.core.model import Repository
from p2pcache.core.ranges import ByteRange
from p2pcache.upstream.auth import Authenticator
from p2pcache.upstream.client import Upstream
from p2pcache.upstream.credentials import CredentialStore
from p2pcache.upstream.endpoint import Endpoint, Patience, UpstreamConfig
from p2pcache.upstream.transport import Deadline, Transport
from tests.fakes import (
    Answer,
    BasicAuth,
    FakeHost,
    FakeRegistry,
    Header,
    Hold,
    Redirect,
    Reset,
    Short,
    Stall,
    TestAuthority,
    Together,
    TokenAuth,
)

DATA = b"0123456789" * 10_000
USER_AND_PASSWORD = base64.b64encode(b"user:hunter2").decode()
SECRETS = ("hunter2", USER_AND_PASSWORD, "sig%2F", "secret%3D", "granted-", "refresh-me")
REPOSITORY = Repository.parse("r.example", "team/app")
QUICK = Patience(connect_s=2.0, headers_s=2.0, progress_s=2.0, total_s=10.0, pause_s=0.001)


@pytest.fixture(autouse=True)
def no_secret_is_logged(caplog):
    caplog.set_level(logging.DEBUG)
    yield
    told = "".join(str(record.__dict__) for record in caplog.records)
    assert not [secret for secret in SECRETS if secret in told]


@asynccontextmanager
async def reading_from(registry, **options):
    config = UpstreamConfig(endpoints={registry.address: registry.url}, patience=QUICK, **options)
    async with Upstream(config) as upstream:
        yield upstream


async def read(upstream, registry, blob, start=0, stop=100, name="team/app"):
    part = ByteRange(start, stop)
    async with aclosing(upstream.read(registry.repository(name), blob, part, len(DATA))) as blocks:
        got = b"".join([block async for block in blocks])
    assert got == DATA[start:stop]


def write_config(path, registry, username="user", password="hunter2", **entry):
    entry = entry or {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}
    path.write_text(json.dumps({"auths": {registry.address: entry}}))
    return path


# Tokens.


async def test_a_token_is_fetched_once_and_used_again():
    async with FakeRegistry(auth=TokenAuth()) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            for _ in range(3):
                await read(upstream, registry, blob)
        assert [access.status for access in registry.log] == [401, 206, 206, 206]
        assert registry.tokens.scopes == ["repository:team/app:pull"]
        assert "service=fake" in registry.tokens.log[0].query
        assert registry.tokens.log[0].authorization is None


async def test_each_repository_has_its_own_token():
    async with FakeRegistry(auth=TokenAuth()) as registry:
        blobs = [registry.add_blob(name, DATA) for name in ("one", "two")]
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blobs[0], name="one")
            await read(upstream, registry, blobs[1], name="two")
        assert registry.tokens.scopes == ["repository:one:pull", "repository:two:pull"]


async def test_a_registry_may_know_the_repository_by_another_name():
    auth = TokenAuth(named_scope=lambda name: f"proxy/{name}")
    async with FakeRegistry(auth=auth) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)
        assert registry.tokens.scopes == ["repository:proxy/team/app:pull"]


async def test_many_readers_share_one_token_request():
    released = asyncio.Event()
    async with FakeRegistry(auth=TokenAuth()) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.tokens.inject(Hold(released))
        async with reading_from(registry) as upstream, asyncio.TaskGroup() as tasks:
            for _ in range(20):
                tasks.create_task(read(upstream, registry, blob))
            await registry.arrived(20)
            await registry.tokens.arrived(1)
            released.set()
        assert len(registry.tokens.log) == 1


async def test_a_reader_that_leaves_does_not_take_the_token_along():
    async with FakeRegistry(auth=TokenAuth()) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.tokens.inject(Stall(-1))
        async with reading_from(registry) as upstream:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await read(upstream, registry, blob)
            await read(upstream, registry, blob)


@pytest.mark.parametrize(("status", "error"), [(403, SourceRefused), (500, SourceUnavailable)])
async def test_those_who_wait_for_a_token_share_its_failure(status, error):
    released = asyncio.Event()
    async with FakeRegistry(auth=TokenAuth()) as registry, Transport(QUICK, None) as transport:
        registry.tokens.inject(Together((Answer(status), Hold(released))), times=None)
        auth = Authenticator(transport, CredentialStore(None))
        endpoint = Endpoint.of(registry.address, registry.url)
        fields = [f'Bearer realm="{registry.tokens.url}/token"']

        async def refused():
            with pytest.raises(error, match=f"token service answered {status}"):
                await auth.answer(endpoint, REPOSITORY, fields, None, Deadline.after(5.0))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(5):
                tasks.create_task(refused())
            await registry.tokens.arrived(1)
            released.set()
        assert len(registry.tokens.log) == 1
        await refused()
        assert len(registry.tokens.log) == 2, "who comes later asks anew"


async def test_a_token_that_was_refused_long_ago_takes_no_new_one_along():
    async with FakeRegistry(auth=TokenAuth()) as registry, Transport(QUICK, None) as transport:
        auth = Authenticator(transport, CredentialStore(None))
        endpoint = Endpoint.of(registry.address, registry.url)
        fields = [f'Bearer realm="{registry.tokens.url}/token"']
        first = await auth.answer(endpoint, REPOSITORY, fields, None, Deadline.after(5.0))
        second = await auth.answer(endpoint, REPOSITORY, fields, first, Deadline.after(5.0))
        late = await auth.answer(endpoint, REPOSITORY, fields, first, Deadline.after(5.0))
        assert first != second == late
        assert len(registry.tokens.log) == 2


async def test_a_token_is_waited_for_no_longer_than_allowed():
    async with FakeRegistry(auth=TokenAuth()) as registry, Transport(QUICK, None) as transport:
        registry.tokens.inject(Hold(asyncio.Event()))
        auth = Authenticator(transport, CredentialStore(None))
        endpoint = Endpoint.of(registry.address, registry.url)
        fields = [f'Bearer realm="{registry.tokens.url}/token"']
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(
                auth.answer(endpoint, REPOSITORY, fields, None, Deadline.after(5.0))
            )
            await registry.tokens.arrived(1)
            with pytest.raises(SourceUnavailable, match="waiting for a token"):
                await auth.answer(endpoint, REPOSITORY, fields, None, Deadline.after(0.01))
            first.cancel()


async def test_a_token_that_is_taken_back_is_fetched_again():
    async with FakeRegistry(auth=TokenAuth()) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)
            registry.tokens.revoke()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(10):
                    tasks.create_task(read(upstream, registry, blob))
        assert len(registry.tokens.log) == 2


@pytest.mark.parametrize(("expires_in", "fetched"), [(None, 1), ("300", 1), (-1, 1), (1e-9, 3)])
async def test_a_token_is_used_for_as_long_as_it_lasts(expires_in, fetched):
    async with FakeRegistry(auth=TokenAuth(expires_in=expires_in)) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            for _ in range(3):
                await read(upstream, registry, blob)
        assert len(registry.tokens.log) == fetched


async def test_too_narrow_a_token_is_fetched_again_once():
    async with FakeRegistry(auth=TokenAuth()) as registry:
        blob = registry.add_blob("team/app", DATA)
        challenge = (
            f'Bearer realm="{registry.tokens.url}/token",service="fake",'
            'error="insufficient_scope",scope="repository:team/app:pull"'
        )
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)
            registry.inject(Answer(403, {"WWW-Authenticate": challenge}))
            await read(upstream, registry, blob)
            assert len(registry.tokens.log) == 2
            registry.inject(Answer(403, {"WWW-Authenticate": challenge}), times=None)
            with pytest.raises(SourceRefused):
                await read(upstream, registry, blob)
        assert len(registry.tokens.log) == 3


@pytest.mark.parametrize("fault", [Answer(503), Answer(429), Short(-1), Reset(-1), Short(3)])
async def test_a_failing_token_service_is_asked_again(fault):
    async with FakeRegistry(auth=TokenAuth()) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.tokens.inject(fault, times=2)
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(401), SourceRefused),
        (Answer(302, {"Location": "http://127.0.0.1:1/"}), SourceRefused),
        (Answer(200, {}, b"{}"), SourceRefused),
        (Answer(200, {}, b'{"token": "a b"}'), SourceRefused),
        (Answer(200, {}, b'{"token": "a\\r\\nX-Header: b"}'), SourceRefused),
        (Answer(200, {}, b"no json"), SourceUnavailable),
        (Answer(200, {}, b'{"token": 7, "expires_in": []}'), SourceUnavailable),
    ],
)
async def test_a_useless_token_service_is_an_error(answer, error):
    async with FakeRegistry(auth=TokenAuth()) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.tokens.inject(answer, times=None)
        async with reading_from(registry) as upstream:
            with pytest.raises(error):
                await read(upstream, registry, blob)


@pytest.mark.parametrize(
    "challenge",
    [
        "Negotiate",
        'Bearer service="no realm"',
        'Bearer realm="ftp://x"',
        'Bearer realm="https://user:hunter2@x/"',
        'Bearer realm="https://[::1"',
        'Bearer realm="unclosed',
    ],
)
async def test_a_challenge_that_cannot_be_answered_is_a_refusal(challenge):
    async with FakeRegistry() as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.inject(Answer(401, {"WWW-Authenticate": challenge}), times=None)
        async with reading_from(registry) as upstream:
            with pytest.raises(SourceRefused) as caught:
                await read(upstream, registry, blob)
    assert "hunter2" not in str(caught.value)
    assert len(registry.log) == 1


async def test_a_safe_registry_cannot_name_an_unsafe_token_service(tmp_path):
    authority = TestAuthority(tmp_path)
    async with (
        FakeHost() as unsafe,
        FakeRegistry(auth=TokenAuth(), tls=authority) as registry,
    ):
        blob = registry.add_blob("team/app", DATA)
        config = write_config(tmp_path / "config.json", registry)
        challenge = f'Bearer realm="{unsafe.url}/token",service="fake"'
        options = {"ca_file": authority.ca_file, "registry_config": config}
        registry.inject(Answer(401, {"WWW-Authenticate": challenge}))
        async with reading_from(registry, **options) as upstream:
            with pytest.raises(SourceRefused, match="plain http"):
                await read(upstream, registry, blob)
        assert unsafe.log == []


# Credentials.


async def test_a_password_opens_a_private_repository(tmp_path):
    auth = TokenAuth(users={"user": "hunter2"}, private={"team/app"})
    async with FakeRegistry(auth=auth) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            with pytest.raises(SourceRefused):
                await read(upstream, registry, blob)
        config = write_config(tmp_path / "config.json", registry)
        async with reading_from(registry, registry_config=config) as upstream:
            await read(upstream, registry, blob)
        assert "hunter2" not in str(registry.log)
        assert all("Basic" not in (access.authorization or "") for access in registry.log)


async def test_an_identity_token_is_posted_for_an_access_token(tmp_path):
    auth = TokenAuth(identity_tokens={"refresh-me"}, private={"team/app"})
    async with FakeRegistry(auth=auth) as registry:
        blob = registry.add_blob("team/app", DATA)
        config = write_config(tmp_path / "c.json", registry, identitytoken="refresh-me")
        async with reading_from(registry, registry_config=config) as upstream:
            await read(upstream, registry, blob)
        assert [access.method for access in registry.tokens.log] == ["POST"]
        assert registry.tokens.log[0].query == ""


async def test_a_registry_token_is_used_as_it_is(tmp_path):
    async with FakeRegistry(auth=TokenAuth(private={"team/app"})) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.tokens.granted["abc.def"] = "team/app"
        config = write_config(tmp_path / "c.json", registry, registrytoken="abc.def")
        async with reading_from(registry, registry_config=config) as upstream:
            await read(upstream, registry, blob)
        assert registry.tokens.log == []


async def test_a_registry_may_want_the_password_itself(tmp_path):
    async with FakeRegistry(auth=BasicAuth({"user": "hunter2"})) as registry:
        blob = registry.add_blob("team/app", DATA)
        config = write_config(tmp_path / "config.json", registry)
        async with reading_from(registry, registry_config=config) as upstream:
            await read(upstream, registry, blob)
            await read(upstream, registry, blob)
        assert [access.status for access in registry.log] == [401, 206, 206]
        async with reading_from(registry) as upstream:
            with pytest.raises(SourceRefused, match="none is configured"):
                await read(upstream, registry, blob)


async def test_a_wrong_password_is_tried_once(tmp_path):
    async with FakeRegistry(auth=BasicAuth({"user": "other"})) as registry:
        blob = registry.add_blob("team/app", DATA)
        config = write_config(tmp_path / "config.json", registry)
        async with reading_from(registry, registry_config=config) as upstream:
            with pytest.raises(SourceRefused):
                await read(upstream, registry, blob)
        assert len(registry.log) == 2


@dataclass
class File:
    """Just enough of a registry for `write_config`."""

    address: str = field(default="r.example")


async def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "config.json"
    store = CredentialStore(path, recheck_s=0.0)
    assert await store.find(REPOSITORY) is None
    write_config(path, File(), password="one")
    assert await store.find(REPOSITORY) == Password("user", "one")
    # As Kubernetes does it: another file under the same name.
    replacement = write_config(tmp_path / "new.json", File(), password="two")
    replacement.rename(path)
    assert await store.find(REPOSITORY) == Password("user", "two")


async def test_a_file_that_breaks_leaves_what_was_known(tmp_path, caplog):
    path = write_config(tmp_path / "config.json", File())
    store = CredentialStore(path, recheck_s=0.0)
    known = await store.find(REPOSITORY)
    path.write_text('{"auths": {"r.example": {"auth": "hunter2-hunter2"}}}')
    for _ in range(3):
        assert await store.find(REPOSITORY) == known
    path.unlink()
    for _ in range(3):
        assert await store.find(REPOSITORY) == known
    assert [r.message for r in caplog.records].count("credentials.bad") == 2, "said once each"
    write_config(path, File(), password="new")
    assert await store.find(REPOSITORY) == Password("user", "new")


async def test_a_file_is_looked_at_now_and_then_only(tmp_path):
    path = write_config(tmp_path / "config.json", File(), password="one")
    store = CredentialStore(path, recheck_s=3600.0)
    known = await store.find(REPOSITORY)
    write_config(path, File(), password="two")
    assert await store.find(REPOSITORY) == known


# Helpers.


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """Install a credential helper that runs a shell script; return its configuration."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def install(script, *, key="credsStore"):
        program = tmp_path / "docker-credential-fake"
        program.write_text(f"#!/bin/sh\necho run >> {tmp_path}/runs\n{script}\n")
        program.chmod(stat.S_IRWXU)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({key: "fake" if key == "credsStore" else {"r.example": "fake"}}))
        return path

    return install


def runs(tmp_path):
    log = tmp_path / "runs"
    return log.read_text().count("run") if log.exists() else 0


@pytest.mark.parametrize("key", ["credsStore", "credHelpers"])
async def test_a_helper_is_asked_and_remembered(helper, tmp_path, key):
    script = """read server; printf '{"Username":"%s","Secret":"hunter2"}' "$1-$server" """
    store = CredentialStore(helper(script, key=key), recheck_s=0.0)
    async with asyncio.TaskGroup() as tasks:
        found = [tasks.create_task(store.find(REPOSITORY)) for _ in range(5)]
    assert {task.result() for task in found} == {Password("get-r.example", "hunter2")}
    assert runs(tmp_path) == 1


async def test_a_helper_may_give_an_identity_token(helper):
    store = CredentialStore(helper("""echo '{"Username":"<token>","Secret":"refresh-me"}'"""))
    assert await store.find(REPOSITORY) == IdentityToken("refresh-me")


async def test_a_refused_answer_is_asked_for_again(helper, tmp_path):
    store = CredentialStore(helper("""echo '{"Secret":"x"}'"""), helper_rest_s=0.0)
    store.forget("r.example")
    await store.find(REPOSITORY)
    store.forget("r.example")
    await store.find(REPOSITORY)
    assert runs(tmp_path) == 2


async def test_refusals_in_a_row_start_no_crowd_of_processes(helper, tmp_path):
    store = CredentialStore(helper("""echo '{"Secret":"x"}'"""), helper_rest_s=60.0)
    for _ in range(3):
        await store.find(REPOSITORY)
        store.forget("r.example")
    assert runs(tmp_path) == 1


@pytest.mark.parametrize(
    "script",
    [
        "echo credentials not found in native keychain; exit 1",
        "echo no json",
        "exec yes",
        "exec 1>&-",
        "kill -9 $$",
        "sleep 60 & wait",
    ],
)
async def test_a_helper_that_fails_is_done_without(helper, tmp_path, script):
    path = helper(script)
    config = json.loads(path.read_text())
    config["auths"] = {"r.example": {"username": "u", "password": "p"}}
    path.write_text(json.dumps(config))
    store = CredentialStore(path, helper_timeout_s=0.5)
    assert await store.find(REPOSITORY) == Password("u", "p")
    assert await store.find(REPOSITORY) == Password("u", "p")
    assert runs(tmp_path) == 1, "a failure is remembered, too"


async def test_a_helper_that_says_too_much_is_cut_off(helper):
    store = CredentialStore(helper("exec yes"), helper_timeout_s=60.0)
    async with asyncio.timeout(5.0):
        assert await store.find(REPOSITORY) is None


def has_ended(process):
    """Wait for a process that need not be a child, for five seconds at most."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 5.0)[0])
    finally:
        os.close(handle)


async def test_a_helper_that_hangs_does_not_outlive_its_time(helper, tmp_path):
    store = CredentialStore(
        helper(f"sleep 60 & echo $! > {tmp_path}/child; wait"), helper_timeout_s=0.3
    )
    assert await store.find(REPOSITORY) is None
    assert has_ended(int((tmp_path / "child").read_text()))


async def test_a_helper_that_is_not_there_is_done_without(tmp_path, caplog):
    path = tmp_path / "config.json"
    path.write_text('{"credsStore": "surely-not-installed"}')
    assert await CredentialStore(path).find(REPOSITORY) is None
    assert "credentials.helper_failed" in [record.message for record in caplog.records]


# Redirects.


async def test_storage_is_asked_without_the_registrys_authorization(tmp_path):
    auth = TokenAuth(users={"user": "hunter2"}, private={"team/app"})
    async with FakeRegistry(auth=auth, storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        config = write_config(tmp_path / "config.json", registry)
        async with reading_from(registry, registry_config=config) as upstream:
            await read(upstream, registry, blob)
        (access,) = registry.storage.log
        assert access.status == 206
        assert access.authorization is None
        assert access.range == "bytes=0-99"


async def test_the_storages_address_is_remembered():
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            for start in (0, 100, 200):
                await read(upstream, registry, blob, start, start + 100)
        assert len(registry.log) == 1
        assert len(registry.storage.log) == 3
        assert registry.storage.connections == 1


async def test_an_address_that_lapses_at_once_is_not_remembered():
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.storage.lifetime_s = 0
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)
            await read(upstream, registry, blob)
        assert len(registry.log) == 2


async def test_a_lapsed_address_is_asked_for_again():
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)
            registry.storage.revoke()
            await read(upstream, registry, blob)
            await read(upstream, registry, blob)
        assert len(registry.log) == 2
        assert [access.status for access in registry.storage.log] == [206, 403, 206, 206]


async def test_a_lapsed_address_is_not_tried_twice():
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)
            registry.storage.revoke()
            registry.inject(Answer(404))
            with pytest.raises(SourceLacksBlob):
                await read(upstream, registry, blob)
            await read(upstream, registry, blob)
        assert [access.status for access in registry.storage.log] == [206, 403, 206]


@pytest.mark.parametrize(
    "fault", [Short(-1), Redirect("http://127.0.0.1:1/"), Answer(410), Answer(400)]
)
async def test_an_address_that_fails_is_asked_for_again(fault):
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)
            # The HTTP library itself tries once more when a kept connection turns out closed.
            registry.storage.inject(fault, times=2 if fault == Short(-1) else 1)
            await read(upstream, registry, blob)
        assert len(registry.log) == 2


async def test_the_size_behind_a_redirect_is_read_from_a_range():
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            assert await upstream.blob_size(registry.repository("team/app"), blob) == len(DATA)
            await read(upstream, registry, blob)
        assert [access.method for access in registry.log] == ["HEAD", "GET"]
        assert [access.method for access in registry.storage.log] == ["GET", "GET"]


async def test_storage_that_lacks_the_bytes_lacks_the_blob():
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.storage.inject(Answer(404))
        async with reading_from(registry) as upstream:
            with pytest.raises(SourceLacksBlob):
                await read(upstream, registry, blob)


async def test_storage_that_fails_is_asked_again():
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.storage.inject(Short(10))
        registry.storage.inject(Answer(503))
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)


async def test_a_redirect_within_the_registry_keeps_the_authorization():
    async with FakeRegistry(auth=TokenAuth()) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.add_blob("real/app", DATA)
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)
            registry.inject(Redirect(f"/v2/team/app/blobs/{blob}"))
            await read(upstream, registry, blob)
        assert all(access.authorization for access in registry.log[1:])


async def test_storage_that_asks_for_quiet_gets_it():
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)
            registry.storage.inject(Answer(429, {"Retry-After": "600"}))
            for _ in range(3):
                with pytest.raises(SourceUnavailable) as caught:
                    await read(upstream, registry, blob)
                assert (caught.value.retry_after_s or 0.0) > 590
        assert len(registry.log) == 1
        assert len(registry.storage.log) == 2


async def test_five_redirects_are_followed():
    async with FakeRegistry() as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.inject(Redirect(f"/v2/team/app/blobs/{blob}"), times=5)
        async with reading_from(registry) as upstream:
            await read(upstream, registry, blob)


async def test_redirects_have_an_end():
    async with FakeRegistry() as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.inject(Redirect("/v2/elsewhere"), times=None)
        async with reading_from(registry) as upstream:
            with pytest.raises(SourceRefused, match="redirects"):
                await read(upstream, registry, blob)
        assert len(registry.log) == 6


async def test_a_safe_registry_cannot_redirect_to_an_unsafe_place(tmp_path):
    authority = TestAuthority(tmp_path)
    async with FakeHost() as unsafe, FakeRegistry(tls=authority) as registry:
        blob = registry.add_blob("team/app", DATA)
        registry.inject(Redirect(unsafe.url))
        async with reading_from(registry, ca_file=authority.ca_file) as upstream:
            with pytest.raises(SourceRefused, match="plain http"):
                await read(upstream, registry, blob)
        assert unsafe.log == []


async def test_a_redirect_over_tls_is_followed(tmp_path):
    authority = TestAuthority(tmp_path)
    async with FakeRegistry(tls=authority, storage=True, auth=TokenAuth()) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry, ca_file=authority.ca_file) as upstream:
            await read(upstream, registry, blob)
        assert registry.storage.log[0].status == 206


async def test_no_error_tells_a_signature():
    async with FakeRegistry(storage=True) as registry:
        blob = registry.add_blob("team/app", DATA)
        async with reading_from(registry) as upstream:
            for fault in (Header("Transfer-Encoding", "bogus"), Reset(-1), Answer(500)):
                registry.storage.heal()
                registry.storage.inject(fault, times=None)
                with pytest.raises(SourceUnavailable) as caught:
                    await read(upstream, registry, blob)
                assert "sig%2F" not in str(caught.value)
                assert caught.value.__suppress_context__ or caught.value.__context__ is None
