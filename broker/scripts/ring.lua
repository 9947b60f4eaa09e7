-- Ring for queues that have jobs and no token: for producers that know nothing of tokens, nor of heads.
--
-- KEYS  for each queue: rq:queue:Q
-- ARGV  for each queue: its name
-- Returns how many jobs each queue has; -1 where the key is no list. A paused one wakes nobody.
local lengths = {}
for i, jobs in ipairs(KEYS) do
  local length = redis.pcall('LLEN', jobs)
  if type(length) == 'table' then
    length = -1
  else
    local base = string.match(ARGV[i], '^[^@]*')
    if base ~= ARGV[i] then
      lists.look_at_head(ARGV[i])
    end
    if length > 0 and redis.call('SISMEMBER', K.PAUSED, base) == 0 then
      ring(ARGV[i])
    end
  end
  table.insert(lengths, length)
end
return lengths
