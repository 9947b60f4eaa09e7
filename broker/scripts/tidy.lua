-- Names whose record ran out leave the set of workers; the others are counted.
--
-- KEYS  1 fleet:workers
-- ARGV  names of workers
-- Returns {how many left the set, how many of the others beat}.
local gone, alive = 0, 0
for _, worker in ipairs(ARGV) do
  if redis.call('EXISTS', key('worker_record', worker)) == 0 then
    gone = gone + redis.call('SREM', KEYS[1], worker)
  else
    alive = alive + redis.call('EXISTS', key('worker_beat', worker))
  end
end
return {gone, alive}
