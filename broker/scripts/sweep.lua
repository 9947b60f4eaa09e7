-- Remove what nobody holds any more: mirrors without a lease, entries of registries that ran out.
--
-- KEYS  1 rq:wip:Q  2 rq:finished:Q  3 rq:failed:Q
-- ARGV  1 queue  2 most mirrors to look at
-- Returns how many mirrors were removed.
local removed = 0
for _, member in ipairs(redis.pcall('ZRANGE', KEYS[1], 0, tonumber(ARGV[2]) - 1)) do
  local id, execution = string.match(member, '^(.*):([^:]*)$')
  local f = id and job_fields(id)
  if not f or f.status ~= 'started' or execution_of(f.fleet_lease or '') ~= execution then
    redis.call('ZREM', KEYS[1], member)
    if id then
      unmirror(id, ARGV[1], execution)
    end
    removed = removed + 1
  end
end
redis.pcall('ZREMRANGEBYSCORE', KEYS[2], 0, NOW_MS / 1000)
redis.pcall('ZREMRANGEBYSCORE', KEYS[3], 0, NOW_MS / 1000)
return removed
