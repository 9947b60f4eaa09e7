-- No task of an array, or of some ranges of it, is given out any more. Those that are jobs by now are not
-- touched: cancel.lua is for them.
--
-- KEYS  1 rq:job:ID
-- ARGV  1 array  then ranges of its tasks, FIRST-LAST:1; none: all, and the array is stopped
-- Returns {'' for no such array, its job's status where it has ended, else 'stopping'; tasks that will never be}
local array = ARGV[1]
local status, a = redis.pcall('HGET', KEYS[1], 'status'), arrays.array_fields(array)
if not a or type(status) ~= 'string' then
  return {'', 0}
elseif arrays.ARRAY_ENDS[status] then
  return {status, 0}
end
if #ARGV == 1 then
  arrays.stop_array(array, 'canceled')
  return {'stopping', a.left}
end
local count = 0
for i = 2, #ARGV do
  count = count + arrays.move_range('array_todo', 'array_dropped', array, arrays.read_range(ARGV[i]))
end
if count > 0 then -- Lua writes 0 with a sign as -0, which is no number to Redis
  redis.call('HINCRBY', key('array', array), 'left', -count)
end
arrays.touch_array(array)
return {'stopping', count}
