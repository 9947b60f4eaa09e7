-- A paused queue gives out jobs again, and idle workers hear of those that wait in it and its sublists.
--
-- KEYS  1 fleet:paused  2 rq:queue:Q
-- ARGV  1 queue
-- Returns 1 if it was paused.
local queue = ARGV[1]
local was_paused = redis.call('SREM', KEYS[1], queue)

local function ring_for(list)
  local waiting = redis.pcall('LLEN', key('queue', list))
  if type(waiting) == 'number' and waiting > 0 then
    ring(list)
  end
end

ring_for(queue)
for _, digest in ipairs(redis.pcall('HKEYS', key('sets', queue))) do
  ring_for(queue .. '@' .. digest)
end
return was_paused
