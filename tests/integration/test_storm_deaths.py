"""Members that die or fall silent while all nodes start one image."""

import pytest

from tests.integration.storms import AGAIN_WHEN_SLOW, LARGE, storm

pytestmark = [pytest.mark.timeout(120), AGAIN_WHEN_SLOW]


async def test_without_a_fault_the_registry_is_read_once(tmp_path):
    async with storm(tmp_path) as s:
        async with s.starts():
            pass
        s.check(max_ratio=1.05)
        assert s.refusals == s.cuts == 0


@pytest.mark.parametrize("kind", ["lazy", "plain"])
async def test_the_coordinator_is_killed_mid_storm(tmp_path, kind):
    async with storm(tmp_path) as s:
        victim = s.coordinator(getattr(s, kind))
        async with s.starts() as starts:
            await s.until(s.has_sent(0.3))
            s.kill(victim, starts)
        s.check()
        assert s.refusals == s.cuts == 0


@pytest.mark.parametrize("kind", ["lazy", "plain"])
async def test_a_lease_holder_is_killed_in_the_middle_of_its_read(tmp_path, kind):
    async with storm(tmp_path) as s:
        async with s.starts() as starts:
            s.kill(await s.reading(getattr(s, kind)), starts)
        s.check()
        assert s.refusals == s.cuts == 0


@pytest.mark.parametrize("kind", ["lazy", "plain"])
async def test_a_lease_holder_falls_silent_in_the_middle_of_its_read(tmp_path, kind):
    async with storm(tmp_path, **LARGE) as s:
        async with s.starts() as starts:
            victim = await s.reading(getattr(s, kind))
            for line in s.net.lines(victim):
                line.silence()
            await starts.over_but(victim)
            for line in s.net.lines(victim):
                line.heal()
        s.check()
        assert s.refusals == s.cuts == 0
