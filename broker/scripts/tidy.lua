-- Names whose key ran out leave a set of workers; the others are counted.
--
-- KEYS  1 fleet:workers or fleet:drained
-- ARGV  1 the kind of key that each name of the set has: worker_record or worker_drain  then names of workers
-- Returns {how many left the set, how many of the others beat}.
local kind, gone, alive = ARGV[1], 0, 0
for i = 2, #ARGV do
  local worker = ARGV[i]
  if redis.call('EXISTS', key(kind, worker)) == 0 then
    gone = gone + redis.call('SREM', KEYS[1], worker)
  else
    alive = alive + redis.call('EXISTS', key('worker_beat', worker))
  end
end
return {gone, alive}
