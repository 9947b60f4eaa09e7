-- Which attempts are lost: their lease ran out and their worker has no heartbeat.
--
-- KEYS  1 fleet:leases  2 fleet:chores:seen  3 fleet:recovery:not-before
-- ARGV  1 lease ms  2 gap ms, as for elect.lua  3 how many to pass over  4 most to look at
-- Returns {{{job, lease, worker}, ...}, how many to pass over the next time, -1 where
-- none is left}; changes no job.
--
-- Nothing is lost while recovery pauses, nor before elect.lua has judged what just happened.
local lease_ms, gap_ms = tonumber(ARGV[1]), tonumber(ARGV[2])
local first, looked_at = tonumber(ARGV[3]), tonumber(ARGV[4])
local seen = tonumber(string.match(redis.call('GET', KEYS[2]) or '', '^%d+') or 0)
local not_before = tonumber(redis.call('GET', KEYS[3]) or 0)

-- What the clock, set back, would keep for as long as it was set back.
local function shorten()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], NOW_MS + 2 * lease_ms, '+inf', 'LIMIT', 0, looked_at)) do
    redis.call('ZADD', KEYS[1], NOW_MS + lease_ms, id)
  end
end

-- Whether the worker still beats; a heartbeat outlives a lease only where the clock was set back.
local function is_alive(worker)
  local ttl = redis.call('PTTL', key('worker_beat', worker))
  if ttl > 2 * lease_ms then
    redis.call('PEXPIRE', key('worker_beat', worker), lease_ms)
  end
  return ttl ~= -2
end

shorten()
if NOW_MS < not_before or NOW_MS < seen or NOW_MS - seen > gap_ms then
  return {{}, -1}
end
local lost, removed = {}, 0
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', NOW_MS, 'LIMIT', first, looked_at)
for _, id in ipairs(due) do
  local f = job_fields(id)
  if not f or f.status ~= 'started' or not f.fleet_lease then
    removed = removed + redis.call('ZREM', KEYS[1], id)
  elseif not is_alive(f.worker_name or '') then
    table.insert(lost, {id, f.fleet_lease, f.worker_name or ''})
  end
end
local seen_all = #due < looked_at
return {lost, seen_all and -1 or first + looked_at - removed}
