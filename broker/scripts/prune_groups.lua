-- Jobs that are gone leave their groups, and groups without jobs the set of groups.
--
-- KEYS  1 rq:groups  then for each group: rq:group:G
-- ARGV  1 most members of a group to look at, chosen at random  then for each group: its name
-- Returns {how many jobs left, {indexes, from 1, of the groups that are worth another look}}.
local left, again = 0, {}

-- Whether so many of a sample were gone that more will be.
local function prune(group)
  local sample = redis.pcall('SRANDMEMBER', group, tonumber(ARGV[1]))
  local gone = {}
  for _, id in ipairs(sample) do
    if redis.call('EXISTS', key('job', id)) == 0 then
      table.insert(gone, id)
    end
  end
  if #gone > 0 then
    left = left + redis.call('SREM', group, unpack(gone))
  end
  return 4 * #gone > #sample
end

for i = 2, #KEYS do
  local is_worth_it = prune(KEYS[i])
  if redis.call('EXISTS', KEYS[i]) == 0 then
    redis.call('SREM', KEYS[1], ARGV[i])
  elseif is_worth_it then
    table.insert(again, i - 1)
  end
end
return {left, again}
