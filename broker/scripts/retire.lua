-- A worker leaves for good: nothing of it stays behind but an operator's wish to drain its name. Nor does a
-- token for a queue without jobs, for there may be no other worker to take it.
--
-- KEYS  1 fleet:worker:W:beat  2 fleet:worker:W:record  3 rq:worker:W  4 fleet:worker:W:signals
--       5 fleet:worker:W:leases  6 fleet:worker:W:ended  7 fleet:worker:W:left
-- ARGV  1 worker  2 incarnation, or '' for whoever is offline  3 s for which it is known to have left, or 0
--       then the names of its queues
-- Returns 1 if it left, 0 if the name is another's by now or still holds leases.
local current = redis.call('GET', KEYS[1])
if current and current ~= ARGV[2] then
  return 0
end
if redis.call('HLEN', KEYS[5]) > 0 then
  return 0
end
redis.call('DEL', unpack(KEYS))
if ARGV[3] ~= '0' then
  redis.call('SET', KEYS[7], ARGV[2], 'EX', ARGV[3])
end
redis.call('SREM', K.FLEET_WORKERS, ARGV[1])
redis.call('SREM', K.WORKERS, KEYS[3])

local function take_tokens(queue)
  if redis.pcall('LLEN', key('queue', queue)) == 0 then
    redis.call('DEL', key('wake', queue))
  end
end

for i = 4, #ARGV do
  redis.call('SREM', key('queue_workers', ARGV[i]), KEYS[3])
  take_tokens(ARGV[i])
  for _, digest in ipairs(redis.pcall('HKEYS', key('sets', ARGV[i]))) do
    take_tokens(ARGV[i] .. '@' .. digest)
  end
end
return 1
