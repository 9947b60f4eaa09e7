-- Begin to submit an array, where its id is free; the keys of one that is never completed go by themselves.
--
-- KEYS  1 rq:job:ID  2 fleet:array:ID
-- ARGV  1 ttl s  then names and values of the array's hash
-- Returns 1, or 0 where the id is taken.
if redis.call('EXISTS', KEYS[1], KEYS[2]) > 0 then
  return 0
end
redis.call('HSET', KEYS[2], unpack(ARGV, 2))
redis.call('EXPIRE', KEYS[2], ARGV[1])
return 1
