-- Look at jobs of ours that wait: another client may have canceled or deleted what they wait for.
--
-- KEYS  1 rq:deferred:Q  2 fleet:settling
-- ARGV  1 rank to begin at  2 most to look at
-- Returns {how many were looked at, how many of these wait no more}; -1: none, for not all has been done about
-- jobs whose end is known.
if redis.call('LLEN', KEYS[2]) > 0 then
  return {-1, 0}
end
local rank, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local found = redis.pcall('ZRANGE', KEYS[1], rank, rank + most - 1)
for _, id in ipairs(found) do
  if redis.pcall('HEXISTS', key('job', id), 'fleet_on_failed_dependency') == 1 then
    dependents.look_later({id})
  end
end
dependents.work_off()
local left = 0
for _, id in ipairs(found) do
  left = left + (redis.call('ZSCORE', KEYS[1], id) and 1 or 0)
end
return {#found, #found - left}
