-- wrk's script: GET random ranges of one blob. Requests are written beforehand, so that wrk spends
-- its time on sockets. Arguments: path, blob size, range size, seed.
local requests = {}
local at = 0

function init(args)
  math.randomseed(tonumber(args[4]))
  local size, count = tonumber(args[2]), tonumber(args[3])
  for i = 1, 4096 do
    local start = math.random(0, size - count)
    requests[i] = wrk.format("GET", args[1], {
      ["Range"] = string.format("bytes=%d-%d", start, start + count - 1),
    })
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "bytes": %d, "seconds": %.6f, "failed": %d, "p50_us": %d, "p99_us": %d}\n',
    summary.requests, summary.bytes, summary.duration / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
