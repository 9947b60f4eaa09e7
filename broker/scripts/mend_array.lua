-- What others did to an array, or to the jobs of its tasks, is understood; what is stopped is told so again.
--
-- KEYS  1 fleet:arrays
-- ARGV  1 array  2 most tasks to look at in each place
-- Returns 1 if anything was to be done.
local array, most = ARGV[1], tonumber(ARGV[2])
local a, status = arrays.array_fields(array), redis.pcall('HGET', key('job', array), 'status')
if not a or type(status) ~= 'string' then -- deleted: what runs is ended by its workers' next beats
  arrays.expire_array(array, 0)
  return redis.call('ZREM', KEYS[1], array)
end
if status == 'failed' and redis.call('HEXISTS', key('job', array), 'fleet_dependency') == 1 then
  return 0 -- it may wait again, as long as it is kept
elseif arrays.ARRAY_ENDS[status] and not a.stop then
  arrays.stop_array(array, status)
  a.stop = status
end
if a.after and a.held > 0 and not a.unmet and redis.call('EXISTS', key('array', a.after)) == 0 then
  redis.call('HSET', key('array', array), 'unmet', 1) -- nobody will release them
end
if a.stop then
  arrays.cancel_tasks(array, most)
end

-- Where a task is, by its job's hash.
local function place_of(id)
  local f = redis.pcall('HMGET', key('job', id), 'status', 'fleet_lease')
  if f[1] == 'started' and f[2] and f[2] ~= '' then
    return 'running'
  elseif f[1] == 'finished' or f[1] == 'failed' then
    return f[1]
  end
  return (f.err or not f[1] or f[1] == 'stopped' or f[1] == 'canceled') and 'canceled' or 'waiting'
end

local mended = 0
for _, place in ipairs({'running', 'waiting'}) do
  for _, number in ipairs(try('SRANDMEMBER', key(arrays.PLACES[place], array), most) or {}) do
    local id = array .. '-' .. number
    local found = place_of(id)
    if found ~= place then
      task_moves(id, {fleet_array_of = array}, place, found)
      mended = 1
    end
  end
end
arrays.touch_array(array)
return mended
