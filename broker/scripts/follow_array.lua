-- Tasks of one array wait for those of another: from now on the ends of these release them.
--
-- KEYS  1 fleet:array:ID of the other
-- ARGV  1 the other  2 the array that waits, whose hash is there  3 fail or wait: where one does not finish
-- Returns bitmap of the other's tasks that have finished: these release nobody any more; false: no such array.
local other, array, on_failed = ARGV[1], ARGV[2], ARGV[3]
local status = dependents.status_of(other)
if not arrays.array_fields(other) or not status then
  return false
end
redis.call('HSET', KEYS[1], 'followed', 1)
redis.call('SADD', key('array_followers', other), array)
local ttl = redis.call('TTL', KEYS[1])
if ttl > 0 then
  redis.call('EXPIRE', key('array_followers', other), ttl)
end
redis.call('HSET', key('array', array), 'after', other, 'on_failed', on_failed)
if arrays.ARRAY_ENDS[status] and on_failed == 'fail' then
  redis.call('HSET', key('array', array), 'unmet', 1)
end
return redis.call('GET', key('array_finished', other)) or ''
