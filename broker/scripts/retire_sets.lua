-- Sets of requirements of which no job is left for long are forgotten.
--
-- KEYS  1 fleet:sets:BASE
-- ARGV  1 ms for which nothing must have been left  2 base  then the digests to look at
-- Returns how many were forgotten.
local patience_ms, base = tonumber(ARGV[1]), ARGV[2]
local REGISTRIES = {'wip', 'finished', 'failed', 'deferred', 'scheduled', 'canceled'}

local function is_empty(queue)
  if redis.call('EXISTS', key('queue', queue)) == 1 then
    return false
  end
  for _, registry in ipairs(REGISTRIES) do
    if redis.call('EXISTS', key(registry, queue)) == 1 then
      return false
    end
  end
  return true
end

local function forget(digest, queue)
  lists.look_at_head(queue)
  redis.call('HDEL', KEYS[1], digest)
  redis.call('HDEL', K.SETS_IDLE, queue)
  redis.call('HDEL', key('served', base), 'held:' .. digest)
  redis.call('SREM', K.QUEUES, key('queue', queue))
  redis.call('DEL', key('wake', queue), key('reserved', queue))
  lists.tell_of_set(base, digest, nil)
end

local forgotten = 0
for i = 3, #ARGV do
  local queue = base .. '@' .. ARGV[i]
  if not is_empty(queue) then
    redis.call('HDEL', K.SETS_IDLE, queue)
  elseif redis.call('HSETNX', K.SETS_IDLE, queue, digits[NOW_MS]) == 0
    and NOW_MS - (tonumber(redis.call('HGET', K.SETS_IDLE, queue)) or NOW_MS) >= patience_ms then
    forget(ARGV[i], queue)
    forgotten = forgotten + 1
  end
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('DEL', key('served', base))
end
return forgotten
