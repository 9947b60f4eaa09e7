-- The tails of a running job's output, if the caller still holds it.
--
-- KEYS  1 rq:job:ID  2 fleet:output:ID
-- ARGV  1 lease  2 ttl s  3 stdout  4 bytes of stdout so far  5 stderr  6 bytes of stderr so far
-- Returns 1 if kept.
if redis.pcall('HGET', KEYS[1], 'fleet_lease') ~= ARGV[1] then
  return 0
end
try('HSET', KEYS[2], 'lease', ARGV[1], 'stdout', ARGV[3], 'stdout_end', ARGV[4],
  'stderr', ARGV[5], 'stderr_end', ARGV[6])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1
