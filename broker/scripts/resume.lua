-- A paused queue gives out jobs again, and idle workers hear of those that wait in it.
--
-- KEYS  1 fleet:paused  2 rq:queue:Q
-- ARGV  1 queue
-- Returns 1 if it was paused.
local was_paused = redis.call('SREM', KEYS[1], ARGV[1])
local waiting = redis.pcall('LLEN', KEYS[2])
if type(waiting) == 'number' and waiting > 0 then
  ring(ARGV[1])
end
return was_paused
