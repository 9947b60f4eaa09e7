-- New jobs, in one atomic step: all of them or, where an id is taken, none.
--
-- KEYS  1 rq:queue:Q
-- ARGV  1 queue  2 number of field names, then those names
--       then for each job: id, values in the order of the names
-- Returns '' or the first id that is taken.
local queue, width = ARGV[1], tonumber(ARGV[2])
local first = 3 + width
for i = first, #ARGV, width + 1 do
  if redis.call('EXISTS', key('job', ARGV[i])) == 1 then
    return ARGV[i]
  end
end
for i = first, #ARGV, width + 1 do
  local fields = {'created_at', NOW, 'enqueued_at', NOW, 'status', 'queued', 'origin', queue}
  for column = 1, width do
    table.insert(fields, ARGV[2 + column])
    table.insert(fields, ARGV[i + column])
  end
  redis.call('HSET', key('job', ARGV[i]), unpack(fields))
  redis.call('RPUSH', KEYS[1], ARGV[i])
end
redis.call('SADD', K.QUEUES, KEYS[1])
ring(queue)
return ''
