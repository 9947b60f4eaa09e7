-- Take, or keep, a lease on something that one alone does for the fleet.
--
-- KEYS  1 fleet:slurm:lease:WHAT
-- ARGV  1 a word of the one who asks  2 ms
-- Returns 1 if it is theirs
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
