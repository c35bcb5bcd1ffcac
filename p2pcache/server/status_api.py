"""Health and metrics, for probes and Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiohttp import web

from p2pcache.metrics import Metrics


class StatusApi:
    """Answers ``/livez``, ``/readyz`` and ``/metrics``.

    *checks* name what must be true for the node to be ready. Peers and upstreams are not among
    them: a node alone, or cut off, still serves what it holds.
    """

    def __init__(
        self,
        metrics: Metrics,
        checks: Mapping[str, Callable[[], bool]],
        refresh: Callable[[], None],
    ) -> None:
        self._metrics = metrics
        self._checks = checks
        self._refresh = refresh

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer any request: the handler of a low-level aiohttp server."""
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, text="only GET\n")
        match request.path:
            case "/livez":
                return web.Response(text="ok\n")
            case "/readyz" | "/healthz":
                return self._ready(verbose="verbose" in request.query)
            case "/metrics":
                self._refresh()
                headers = {"Content-Type": self._metrics.content_type}
                return web.Response(body=self._metrics.render(), headers=headers)
            case _:
                return web.Response(status=404, text="see /livez, /readyz, /metrics\n")

    def _ready(self, *, verbose: bool) -> web.Response:
        results = {name: check() for name, check in self._checks.items()}
        ready = all(results.values())
        lines = [
            f"[{'+' if ok else '-'}]{name} {'ok' if ok else 'failed'}"
            for name, ok in results.items()
        ]
        text = "\n".join([*(lines if verbose or not ready else []), "ok" if ready else "not ready"])
        return web.Response(status=200 if ready else 503, text=text + "\n")
