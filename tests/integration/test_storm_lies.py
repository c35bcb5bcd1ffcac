"""Members that claim to have what they lack while all nodes start one image."""

import aiohttp
import pytest

from p2pcache.core.claims import Claim, Claims, Cut, RegionKey, encode_claims, region_mask
from p2pcache.core.layout import PieceMask
from p2pcache.core.wire import MEDIA_TYPE, PROTOCOL
from tests.fakes import Stall
from tests.fakes_peer import FakePeer
from tests.integration.nodes import MIB
from tests.integration.storms import AGAIN_WHEN_SLOW, Layer, Storm, storm

pytestmark = [pytest.mark.timeout(120), AGAIN_WHEN_SLOW]


async def boast(s: Storm, liar: FakePeer) -> None:
    """Tell every node, whoever coordinates, that *liar* holds all layers."""

    def claims(layer: Layer) -> list[Claim]:
        cuts = [layer.cut]
        if layer.toc_digest is not None:
            cuts.append(Cut.of_tail(layer.digest, layer.toc_digest))
        return [
            Claim(
                RegionKey(cut.digest, cut.name, index),
                held=region_mask(PieceMask.full(cut.count), index),
            )
            for cut in cuts
            for index in cut.regions(PieceMask.full(cut.count))
        ]

    message = Claims(liar.address, [*claims(s.lazy), *claims(s.plain)])
    async with aiohttp.ClientSession() as session:
        for number in range(len(s.nodes)):
            url = f"http://{s.net.behind(number)}/p2p/{PROTOCOL}/claims"
            headers = {"Content-Type": MEDIA_TYPE}
            async with session.post(url, data=encode_claims(message), headers=headers) as answer:
                assert answer.status == 200


async def test_a_peer_claims_to_hold_what_it_lacks(tmp_path):
    async with FakePeer() as liar, storm(tmp_path, 4, others=lambda: [liar.url]) as s:
        await boast(s, liar)
        async with s.starts():
            await s.until(s.has_sent(0.3))
            await boast(s, liar)
        s.check(max_ratio=1.2)
        assert s.refusals == s.cuts == 0
        assert liar.requests("*/blobs/*")  # it was believed


async def test_a_peer_that_claims_to_hold_all_never_answers(tmp_path):
    async with (
        FakePeer() as liar,
        storm(tmp_path, 4, lazy_bytes=MIB, plain_bytes=2 * MIB, others=lambda: [liar.url]) as s,
    ):
        liar.inject(Stall(after=-1), times=None)
        await boast(s, liar)
        async with s.starts():
            await s.until(s.has_sent(0.3))
            await boast(s, liar)
        s.check(max_ratio=1.2)
        assert s.refusals == s.cuts == 0
        assert liar.requests("*/blobs/*")
