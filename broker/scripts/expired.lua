-- Which attempts are lost: their lease ran out and their worker has no heartbeat.
--
-- KEYS  1 fleet:leases  2 fleet:chores:seen  3 fleet:recovery:not-before
-- ARGV  1 lease ms  2 gap ms: chores not seen for longer mean that Redis was away  3 most to return
-- Returns {{job, lease, worker, queue, losses, 1 if it counts as a loss}, ...}; changes no job.
--
-- After an outage, or a jump of Redis's clock, every lease looks expired: recovery pauses for one
-- lease, in which workers renew theirs, and what ran out before the pause ended counts for nobody.
local lease_ms, gap, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local seen = tonumber(redis.call('GET', KEYS[2]) or 0)
redis.call('SET', KEYS[2], NOW_MS)
if NOW_MS - seen > gap or NOW_MS < seen then
  redis.call('SET', KEYS[3], NOW_MS + lease_ms, 'PX', 4 * lease_ms)
end
-- leases from before the clock was set back would not run out for as long as it was set back
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], NOW_MS + 2 * lease_ms, '+inf', 'LIMIT', 0, 100)) do
  redis.call('ZADD', KEYS[1], NOW_MS + lease_ms, id)
end
local not_before = tonumber(redis.call('GET', KEYS[3]) or 0)
if NOW_MS < not_before then
  return {}
end

local lost = {}
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', NOW_MS, 'WITHSCORES', 'LIMIT', 0, 1000)
for i = 1, #due, 2 do
  local id, f = due[i], job_fields(due[i])
  if not f or f.status ~= 'started' or not f.fleet_lease then
    redis.call('ZREM', KEYS[1], id)
  elseif #lost < most and redis.call('EXISTS', key('worker_beat', f.worker_name or '')) == 0 then
    local counts = tonumber(due[i + 1]) >= not_before and 1 or 0
    table.insert(lost, {id, f.fleet_lease, f.worker_name or '', f.origin or '', number(f.fleet_losses, 0), counts})
  end
end
return lost
