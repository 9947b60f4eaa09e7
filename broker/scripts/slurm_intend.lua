-- Write down that an allocation is about to be asked for, unless its pool has as many workers as it may have:
-- before it is, so that however many runners there are, and whatever becomes of them, none goes beyond that.
--
-- KEYS  1 fleet:slurm:submissions  2 fleet:slurm:pools  3 fleet:slurm:pool:POOL
-- ARGV  1 name of the submission  2 its JSON  3 pool  4 workers of it  5 most workers of the pool
-- Returns 1; 0 where there would be too many, or the pool is paused, or gone
if redis.call('HEXISTS', KEYS[2], ARGV[3]) == 0 or redis.call('HEXISTS', KEYS[3], 'paused') == 1 then
  return 0
end
local workers = tonumber(ARGV[4])
for _, text in ipairs(redis.call('HVALS', KEYS[1])) do
  local row = cjson.decode(text)
  if row.pool == ARGV[3] and not row.ended_at then
    workers = workers + row.nodes * row.workers_per_node * row.allocations
  end
end
if workers > tonumber(ARGV[5]) then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
