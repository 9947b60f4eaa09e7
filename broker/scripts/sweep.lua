-- Remove what nobody holds any more: mirrors without a lease, entries of registries that ran out.
--
-- KEYS  for each queue: rq:wip:Q, rq:finished:Q, rq:failed:Q
-- ARGV  1 most entries to look at  2 rank in the first queue's mirrors to begin at
--       then for each queue: its name
-- Returns {how many mirrors were removed, index of the queue to go on with, from 1, rank in its mirrors};
--         past the last queue all is done.
local left, rank = tonumber(ARGV[1]), tonumber(ARGV[2])
local removed = 0

-- Whether it was removed.
local function look(wip, queue, member)
  local id, execution = string.match(member, '^(.*):([^:]*)$')
  local f = id and job_fields(id)
  if f and f.status == 'started' and execution_of(f.fleet_lease or '') == execution then
    return false
  end
  redis.call('ZREM', wip, member)
  if id then
    unmirror(id, queue, execution)
  end
  removed = removed + 1
  return true
end

-- Entries whose time has passed, no more than there is room for: `left` falls.
local function expire(registry)
  local gone = redis.pcall('ZRANGEBYSCORE', registry, 0, NOW_MS / 1000, 'LIMIT', 0, left)
  if #gone > 0 then
    redis.call('ZREM', registry, unpack(gone))
    left = left - #gone
  end
end

for i = 1, #KEYS / 3 do
  local wip, queue = KEYS[3 * i - 2], ARGV[2 + i]
  local members = redis.pcall('ZRANGE', wip, rank, rank + left - 1)
  for _, member in ipairs(members) do
    if not look(wip, queue, member) then
      rank = rank + 1
    end
  end
  left = left - #members
  for _, registry in ipairs({KEYS[3 * i - 1], KEYS[3 * i]}) do
    if left > 0 then
      expire(registry)
    end
  end
  if left <= 0 then
    return {removed, i, rank}
  end
  rank = 0
end
return {removed, #KEYS / 3 + 1, 0}
