-- Jobs whose time has come go to their queues.
--
-- KEYS  for each queue: rq:scheduled:Q
-- ARGV  1 most to move of one queue  2 most to move in all  then for each queue: its name
-- Returns {how many were moved, {indexes, from 1, of queues that may have more, those not looked at first}}.
local most, left = tonumber(ARGV[1]), tonumber(ARGV[2])

local function move(scheduled, queue, id)
  redis.call('ZREM', scheduled, id)
  local f = redis.pcall('HMGET', key('job', id),
    'status', 'enqueue_at_front', 'ttl', 'enqueue_at_front_on_retry', 'fleet_attempts')
  if f[1] == 'scheduled' then
    lists.enqueue(id, queue, f[2] == '1' or (f[4] == '1' and f[5]), f[3])
  end
end

local moved, unseen, full = 0, {}, {}
for i, scheduled in ipairs(KEYS) do
  local room = math.min(most, left)
  if room == 0 then
    table.insert(unseen, i)
  else
    local due = redis.pcall('ZRANGEBYSCORE', scheduled, '-inf', NOW_MS / 1000, 'LIMIT', 0, room)
    for _, id in ipairs(due) do
      move(scheduled, ARGV[2 + i], id)
    end
    moved, left = moved + #due, left - #due
    if #due == room then
      table.insert(full, i)
    end
  end
end
for _, i in ipairs(full) do
  table.insert(unseen, i)
end
return {moved, unseen}
