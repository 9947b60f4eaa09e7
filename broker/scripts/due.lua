-- Jobs whose time has come go to their queue.
--
-- KEYS  1 rq:scheduled:Q
-- ARGV  1 queue  2 most to move
-- Returns how many were moved.
local moved = 0
local due = redis.pcall('ZRANGEBYSCORE', KEYS[1], '-inf', NOW_MS / 1000, 'LIMIT', 0, tonumber(ARGV[2]))
for _, id in ipairs(due) do
  redis.call('ZREM', KEYS[1], id)
  local f = redis.pcall('HMGET', key('job', id), 'status', 'enqueue_at_front', 'ttl')
  if f[1] == 'scheduled' then
    enqueue(id, ARGV[1], f[2] == '1', f[3])
    moved = moved + 1
  end
end
return moved
