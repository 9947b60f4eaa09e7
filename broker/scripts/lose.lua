-- Take jobs from a worker that died, if it is still so: to the front of their queues, or failed
-- once they were lost too often.
--
-- KEYS  1 fleet:leases  2 fleet:losses:not-before
-- ARGV  1 losses limit  2 1 if the lease must have run out and the worker have no heartbeat
--       then for each job: JSON {job, lease, reason, exc_string, uncounted}
-- Returns how many were taken. What ran out, or would have, before the time of elect.lua counts as no loss.
local limit, check = tonumber(ARGV[1]), ARGV[2] == '1'
local counted_from = tonumber(redis.call('GET', KEYS[2]) or 0)
local taken = 0
for i = 3, #ARGV do
  local ended = cjson.decode(ARGV[i])
  local f = job_fields(ended.job)
  local held = f and f.status == 'started' and f.fleet_lease == ended.lease
  local expiry = tonumber(redis.call('ZSCORE', KEYS[1], ended.job) or 0)
  local alive = check and (expiry > NOW_MS or redis.call('EXISTS', key('worker_beat', f and f.worker_name or '')) == 1)
  if held and not alive then
    ended.uncounted = ended.uncounted or expiry < counted_from
    setbacks.lose(ended.job, f, ended, limit)
    taken = taken + 1
  end
end
return taken
