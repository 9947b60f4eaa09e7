-- Tasks of an array that were canceled before they began, or those of some ranges of it, are to be given out
-- after all. Those that are jobs are not touched: retry.lua is for them.
--
-- KEYS  1 rq:job:ID
-- ARGV  1 array  then ranges of its tasks, FIRST-LAST:1; none: all
-- Returns {'' for no such array, 'stopping' while some of its tasks are being ended, 'dependency' where it fails
-- again for a job that it waits for, else 'retried'; how many}
local array = ARGV[1]
local f, a = job_fields(array), arrays.array_fields(array)
if not a or not f then
  return {'', 0}
elseif arrays.is_stopping(array) then
  return {'stopping', 0}
end
if f.status == 'failed' and redis.call('HEXISTS', KEYS[1], 'fleet_dependency') == 1 then
  dependents.forgive(array, f.origin)
  dependents.defer(array, f.origin)
  dependents.look(array)
  dependents.work_off()
  return {dependents.status_of(array) == 'failed' and 'dependency' or 'retried', a.left}
end
local count = 0
if #ARGV == 1 then
  count = arrays.move_range('array_dropped', 'array_todo', array, 0, MOST)
end
for i = 2, #ARGV do
  count = count + arrays.move_range('array_dropped', 'array_todo', array, arrays.read_range(ARGV[i]))
end
if count > 0 then
  redis.call('HINCRBY', key('array', array), 'left', count)
  arrays.revive_array(array)
  if redis.call('HGET', KEYS[1], 'status') == 'queued' then
    return {'retried', count}
  elseif redis.call('HEXISTS', KEYS[1], 'fleet_on_failed_dependency') == 1 then -- it may wait for others
    dependents.look(array)
    dependents.work_off()
  else
    try('LREM', key('array_parked', array), 0, array)
    dependents.unblock(array, f.origin)
  end
end
return {count == 0 and a.unmet and 'dependency' or 'retried', count}
