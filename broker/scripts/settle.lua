-- Go on with the dependents of jobs that ended, where other calls had looked at as many as they may.
--
-- KEYS  1 fleet:settling
-- ARGV  1 '' or a gate, which is to open, or to stay shut for good  2 that is: finished, or canceled
-- Returns {how many are left to look at, 1 if the gate is as was asked for}.
local OPEN_SECONDS = 3600 -- for whoever has not passed yet
local gate, how = ARGV[1], ARGV[2]
if gate ~= '' and dependents.status_of(gate) == 'deferred' then
  redis.call('HSET', key('job', gate), 'status', how)
  redis.call('EXPIRE', key('job', gate), OPEN_SECONDS)
  enqueue_dependents(gate, how)
  redis.call('DEL', key('dependents', gate))
end
for _, entry in ipairs(redis.call('LPOP', KEYS[1], dependents.LOOKS) or {}) do
  local ok, found = pcall(cjson.decode, entry)
  if ok and type(found) == 'table' and type(found[1]) == 'string' then
    dependents.look_later(found)
  end
end
dependents.work_off()
flush()
return {redis.call('LLEN', KEYS[1]), dependents.status_of(gate) == how and 1 or 0}
