-- Arrays: one entry of a queue that stands for many tasks. A task becomes a job of its own when it is
-- claimed; from then on it moves as any job does, and its array is told by `task_moves` of _lib.lua.
--
--      held ──▶ todo ─────claim────▶ running ──▶ finished | failed | canceled
--                ▲                     │ ▲                      │
--                ▼ cancel              ▼ │ claim                │ retry
--             dropped                waiting ◀──────────────────┘
--
-- held: the task of that number of another array has not finished (`after`); once that array has ended so
-- (`unmet`) it counts as failed, unless it is to wait on. The array's job is queued while its entry is in
-- its queue, and deferred where all is given out, or as many run as may: then it waits for its tasks, or
-- they for each other. When nothing is held, in todo, running or waiting, it ends.

local PLACES = {
  running = 'array_running', waiting = 'array_waiting', failed = 'array_failed', canceled = 'array_canceled',
}
local KEPT = {
  'array', 'array_items', 'array_todo', 'array_dropped', 'array_running', 'array_waiting', 'array_failed',
  'array_canceled', 'array_finished', 'array_parked', 'array_followers',
}
local MOST_AT_ONCE = 1000  -- tasks given out by one claim
local ITEMS_IN_CHUNK = 32  -- broker/arrays.py has it, too
local ARRAY_TTL = 604800   -- of one whose job says nothing, seconds

-- An array whose state is to be looked at when the script ends.
local function touch_array(array)
  if not moved[array] then
    moved[array], moved[#moved + 1] = {}, array
  end
end

local function task_id(array, number)
  return array .. '-' .. digits[number]
end

-- What an array's hash says, numbers as such; nil where there is none.
local function array_fields(array)
  local values = redis.pcall('HMGET', key('array', array), 'total', 'left', 'held', 'stop', 'max_fails',
    'max_parallel', 'items', 'after', 'unmet', 'followed')
  if values.err or not values[1] then
    return nil
  end
  return {
    total = number(values[1], 0), left = number(values[2], 0), held = number(values[3], 0), stop = values[4],
    max_fails = number(values[5]), max_parallel = number(values[6]), items = values[7],
    after = values[8], unmet = values[9], followed = values[10],
  }
end

local function size_of(kind, array)
  return try('SCARD', key(kind, array)) or 0
end

-- A submission is complete: the array's keys stay until it has ended.
local function keep_array(array)
  for _, kind in ipairs(KEPT) do
    redis.call('PERSIST', key(kind, array))
  end
  redis.call('ZADD', K.ARRAYS, NOW_MS, array)
end

local function read_range(range)
  local first, last, step = string.match(range or '', '^(%d+)-(%d+):(%d+)$')
  return tonumber(first), tonumber(last), tonumber(step)
end

local function as_range(first, last, step)
  return digits[first] .. '-' .. digits[last] .. ':' .. digits[step]
end

-- Off the list of what is to be given out: the first numbers, at most `most`.
local function take_numbers(array, most)
  local todo, numbers = key('array_todo', array), {}
  while #numbers < most do
    local first, last, step = read_range(try('LINDEX', todo, 0))
    if not first then
      break
    end
    local taken = math.min(most - #numbers, math.floor((last - first) / step) + 1)
    for i = 0, taken - 1 do
      numbers[#numbers + 1] = first + i * step
    end
    if first + taken * step > last then
      redis.call('LPOP', todo)
    else
      redis.call('LSET', todo, 0, as_range(first + taken * step, last, step))
    end
  end
  return numbers
end

-- What is left of a range without the numbers from `low` to `high`, and how many of these it had.
local function without(range, low, high)
  local first, last, step = read_range(range)
  if not first then
    return {}, 0
  end
  local begin = math.max(0, math.ceil((low - first) / step)) -- the first within, counted from 0
  local stop = math.min(math.floor((last - first) / step), math.floor((high - first) / step))
  if begin > stop then
    return {range}, 0
  end
  local rest = {}
  if begin > 0 then
    rest[1] = as_range(first, first + (begin - 1) * step, step)
  end
  if first + (stop + 1) * step <= last then
    rest[#rest + 1] = as_range(first + (stop + 1) * step, last, step)
  end
  return rest, stop - begin + 1, as_range(first + begin * step, first + stop * step, step)
end

-- Those of the tasks from `low` to `high` that one list of ranges has go to another; returns how many.
local function move_range(from, to, array, low, high)
  local source, kept, moved_count = key(from, array), {}, 0
  for _, range in ipairs(try('LRANGE', source, 0, -1) or {}) do
    local rest, taken, gone = without(range, low, high)
    if taken > 0 then
      try('RPUSH', key(to, array), gone)
    end
    moved_count = moved_count + taken
    for _, part in ipairs(rest) do
      kept[#kept + 1] = part
    end
  end
  if moved_count > 0 then
    redis.call('DEL', source)
    for _, range in ipairs(kept) do
      redis.call('RPUSH', source, range)
    end
  end
  return moved_count
end

-- What is still to be given out never will be.
local function drop_all(array)
  move_range('array_todo', 'array_dropped', array, 0, MOST)
  redis.call('HSET', key('array', array), 'left', 0)
end

local ITEM_FIELDS = {line = 'fleet_task_line', json = 'fleet_task_json', arguments = 'fleet_task_arguments'}

-- A function that returns the item of a number, which counts from 1.
local function items_of(array)
  local known, items = nil, {}
  return function(number)
    local chunk = math.floor((number - 1) / ITEMS_IN_CHUNK)
    if chunk ~= known then
      local text, at = try('HGET', key('array_items', array), chunk) or '', 1
      known, items = chunk, {}
      while at <= #text do
        items[#items + 1], at = struct.unpack('<I4c0', text, at)
      end
    end
    return items[number - chunk * ITEMS_IN_CHUNK] or ''
  end
end

-- Of an array's job and not of its tasks'.
local NOT_INHERITED = {
  fleet_array = true, dependency_id = true, dependency_ids = true, allow_dependency_failures = true,
  fleet_on_failed_dependency = true, fleet_after_any = true, status = true, worker_name = true, started_at = true,
  ended_at = true, last_heartbeat = true, fleet_reason = true, fleet_attempts = true,
}

local function inherited(flat)
  local fields = {'worker_name', '', 'ended_at', ''}
  for i = 1, #flat, 2 do
    if not NOT_INHERITED[flat[i]] then
      fields[#fields + 1], fields[#fields + 2] = flat[i], flat[i + 1]
    end
  end
  return fields
end

-- The numbers whose ids somebody else's jobs do not have; the others have failed.
local function those_free(array, numbers)
  local names = {}
  for i, number in ipairs(numbers) do
    names[i] = key('job', task_id(array, number))
  end
  if #names == 0 or redis.call('EXISTS', unpack(names)) == 0 then
    return numbers
  end
  local free = {}
  for i, name in ipairs(names) do
    if redis.call('EXISTS', name) == 0 then
      free[#free + 1] = numbers[i]
    else
      count('damaged')
      try('SADD', key('array_failed', array), numbers[i])
    end
  end
  return free
end

-- Off the list, and counted so: those whose jobs can be made.
local function take_free_numbers(array, most)
  local numbers = {}
  while #numbers < most do
    local taken = take_numbers(array, most - #numbers)
    if #taken == 0 then
      break
    end
    redis.call('HINCRBY', key('array', array), 'left', -#taken)
    for _, number in ipairs(those_free(array, taken)) do
      numbers[#numbers + 1] = number
    end
  end
  return numbers
end

local function make_task(id, array, fields, item_field, item)
  local last = #fields
  local flat = {unpack(fields)}
  flat[last + 1], flat[last + 2] = 'fleet_array_of', array
  if item_field then
    flat[last + 3], flat[last + 4] = item_field, item
  end
  redis.call('HSET', key('job', id), unpack(flat))
  return flat
end

-- An array's job is off the queue: it waits for its tasks.
local function wait_for_tasks(array, queue)
  redis.call('HSET', key('job', array), 'status', 'deferred')
  try('ZADD', key('deferred', queue), '+inf', array)
end

-- Make jobs of the next tasks of an array whose entry was met in a queue, at most `most`; `flat` is the hash
-- of its job. Returns {id, hash} of each, which must be given to a worker, and whether the entry has left
-- the queue, but for the list.
local function claim_tasks(queue, array, flat, most)
  local a = array_fields(array)
  if not a or a.stop then
    wait_for_tasks(array, queue) -- until it ends, below or with the last of its tasks
    touch_array(array)
    return {}, true
  end
  local running = a.max_parallel and size_of('array_running', array) or 0
  local room = math.max(0, math.min(most, MOST_AT_ONCE, a.max_parallel and a.max_parallel - running or most))
  local numbers, fields, item = take_free_numbers(array, room), inherited(flat), items_of(array)
  local tasks, item_field = {}, ITEM_FIELDS[a.items]
  for i, number in ipairs(numbers) do
    local id = task_id(array, number)
    tasks[i] = {id, make_task(id, array, fields, item_field, item_field and item(number))}
  end
  if #numbers > 0 then
    try('SADD', key('array_running', array), unpack(numbers))
  end
  if #numbers > 0 and redis.call('HSETNX', key('array', array), 'started_at', NOW) == 1 then
    redis.call('HSET', key('job', array), 'started_at', NOW)
    redis.call('HDEL', key('job', array), 'fleet_on_failed_dependency') -- it waits for no job any more
  end
  local is_done = (try('LLEN', key('array_todo', array)) or 0) == 0
  local is_full = a.max_parallel and running + #numbers >= a.max_parallel
  if is_done or is_full then
    wait_for_tasks(array, queue)
    if not is_done then
      try('LREM', key('array_parked', array), 0, array)
      try('RPUSH', key('array_parked', array), array)
    end
    touch_array(array)
  end
  return tasks, is_done or is_full
end

-- A task that waited in its queue may not be run: its array is stopped or gone.
local function drop_task(id, queue, fields)
  redis.call('HSET', key('job', id), 'status', 'canceled', 'ended_at', NOW)
  try('ZADD', key('canceled', queue), math.floor(NOW_MS / 1000), id)
  keep(id, fields, ARRAY_TTL)
  task_moves(id, fields, 'waiting', 'canceled')
end

-- Whether a task that a queue holds may run now; one that may not is off the queue, then.
local function may_run_again(id, queue, array)
  local a = array_fields(array)
  if not a or a.stop then
    drop_task(id, queue, {fleet_array_of = array})
    return false
  end
  if a.max_parallel and size_of('array_running', array) >= a.max_parallel then
    redis.call('HSET', key('job', id), 'status', 'deferred')
    try('ZADD', key('deferred', queue), '+inf', id)
    try('LPUSH', key('array_parked', array), id)
    return false
  end
  local number = tonumber(string.sub(id, #array + 2)) or -1
  if try('SMOVE', key('array_waiting', array), key('array_running', array), number) ~= 1 then
    try('SADD', key('array_running', array), number) -- an RQ client queued it again
    task_moves(id, {fleet_array_of = array}, 'nowhere', 'running')
  end
  return true
end

-- Whether a task that runs is to be stopped, for its array is.
local stopped_arrays = {}
local function is_array_stopped(array)
  if stopped_arrays[array] == nil then
    local a = array_fields(array)
    local status = redis.pcall('HGET', key('job', array), 'status')
    stopped_arrays[array] = not a or a.stop ~= false or not status or status == 'canceled'
  end
  return stopped_arrays[array]
end

-- Note which tasks have finished, or that they have not; returns those of which that is news.
local function set_finished(array, numbers, bit)
  local command = {'BITFIELD', key('array_finished', array)}
  for _, number in ipairs(numbers) do
    local last = #command
    command[last + 1], command[last + 2], command[last + 3], command[last + 4] = 'SET', 'u1', number, bit
  end
  local changed = {}
  for i, before in ipairs(try(unpack(command)) or {}) do
    if before ~= bit then
      changed[#changed + 1] = numbers[i]
    end
  end
  if #changed > 0 then
    redis.call('HINCRBY', key('array', array), 'finished', bit == 1 and #changed or -#changed)
  end
  return changed
end

-- Where somebody else moved them to, they leave all places but that one.
local function leave_other_places(array, numbers, place)
  for name, kind in pairs(PLACES) do
    if name ~= place then
      try('SREM', key(kind, array), unpack(numbers))
    end
  end
  if place ~= 'finished' then
    set_finished(array, numbers, 0)
  end
end

-- A task of another array has finished, so this one's of that number need not be held any more.
local function release_task(array, number, list)
  local todo = key(list, array)
  local first, last, step = read_range(try('LINDEX', todo, -1))
  if step == 1 and last == number - 1 then
    redis.call('LSET', todo, -1, as_range(first, number, 1))
  else
    try('RPUSH', todo, as_range(number, number, 1))
  end
end

-- The same of several; they are given out unless the array waits for jobs, too, or is stopped.
local function release_tasks(array, numbers)
  local a = array_fields(array)
  if not a then
    return
  end
  for _, number in ipairs(numbers) do
    release_task(array, number, a.stop and 'array_dropped' or 'array_todo')
  end
  redis.call('HINCRBY', key('array', array), 'held', -#numbers)
  local f = redis.pcall('HMGET', key('job', array), 'status', 'origin', 'fleet_on_failed_dependency')
  if not f[1] then -- it is being submitted
    redis.call('EXPIRE', key('array_todo', array), math.max(1, redis.call('TTL', key('array', array))))
  end
  if a.stop then
    return
  end
  redis.call('HINCRBY', key('array', array), 'left', #numbers)
  if f[1] == 'deferred' and not f[3] and (try('LLEN', key('array_parked', array)) or 0) == 0 then
    dependents.unblock(array, f[2])
  end
end

-- Arrays whose tasks wait for this one's.
local function followers(array, a)
  return a.followed and try('SMEMBERS', key('array_followers', array)) or {}
end

local function move_tasks(array, a, from, to, numbers)
  local left = PLACES[from] and try('SREM', key(PLACES[from], array), unpack(numbers)) or 0
  if left < #numbers then
    leave_other_places(array, numbers, to)
  end
  if to == 'finished' then
    local news = set_finished(array, numbers, 1)
    for _, follower in ipairs(followers(array, a)) do
      release_tasks(follower, news)
    end
  else
    try('SADD', key(PLACES[to], array), unpack(numbers))
  end
end

-- Off the front of a queue: the first ids that begin so.
local function take_from_front(queue, prefix)
  local ids = {}
  for _, id in ipairs(try('LRANGE', key('queue', queue), 0, 100) or {}) do
    if string.sub(id, 1, #prefix) ~= prefix then
      break
    end
    ids[#ids + 1] = id
  end
  if #ids > 0 then
    try('LTRIM', key('queue', queue), #ids, -1)
  end
  return ids
end

-- Fewer run than may: what was parked goes back to the front of the queue, tasks before their array.
local function unpark(array, a)
  local room = a.max_parallel - size_of('array_running', array)
  local ids = room > 0 and try('LRANGE', key('array_parked', array), 0, room - 1) or {}
  if #ids == 0 then
    return
  end
  try('LTRIM', key('array_parked', array), #ids, -1)
  for i = #ids, 1, -1 do
    local f = redis.pcall('HMGET', key('job', ids[i]), 'status', 'origin', 'ttl')
    if f[1] == 'deferred' and f[2] then
      try('ZREM', key('deferred', f[2]), ids[i])
      local before = ids[i] == array and take_from_front(f[2], array .. '-') or {}
      lists.enqueue(ids[i], f[2], true, f[3], true)
      for k = #before, 1, -1 do
        try('LPUSH', key('queue', f[2]), before[k])
      end
    end
  end
end

-- Why an array ended as it did, in words; '' where all is well.
local function verdict(array, a)
  local failed, canceled = size_of('array_failed', array), size_of('array_canceled', array)
  local lost = try('LLEN', key('array_dropped', array)) or 0
  local reason = string.format('%d of %d tasks failed', failed, a.total)
  if a.stop == 'canceled' then
    return 'canceled', ''
  elseif a.stop == 'max_fails' then
    return 'failed', 'MaxFails: ' .. reason .. ', more than ' .. a.max_fails
  elseif failed > 0 then
    return 'failed', 'TasksFailed: ' .. reason
  elseif a.held > 0 then
    return 'failed', string.format('dependency %s: %d of its tasks did not finish', a.after, a.held)
  end
  return canceled + lost > 0 and 'canceled' or 'finished', ''
end

local ARRAY_ENDS = {finished = 'finished', failed = 'failed', canceled = 'canceled'}

local function expire_array(array, ttl)
  for _, kind in ipairs(KEPT) do
    if ttl == 0 then
      redis.call('DEL', key(kind, array))
    elseif ttl > 0 then
      redis.call('EXPIRE', key(kind, array), ttl)
    end
  end
end

-- What other arrays' tasks wait for here has not finished and will not, as far as one can tell.
local function give_up_followers(array, a)
  for _, follower in ipairs(followers(array, a)) do
    local b = array_fields(follower)
    if b and b.held > 0 and redis.call('HGET', key('array', follower), 'on_failed') ~= 'wait' then
      redis.call('HSET', key('array', follower), 'unmet', 1)
      touch_array(follower)
    end
  end
end

-- All of its tasks have ended, so the array has.
local function end_array(array, a)
  local f = job_fields(array)
  redis.call('ZREM', K.ARRAYS, array)
  give_up_followers(array, a)
  if not f or ARRAY_ENDS[f.status] then -- an RQ client ended it
    expire_array(array, ARRAY_TTL)
    return
  end
  local status, reason = verdict(array, a)
  local ttl = number(status == 'finished' and f.result_ttl or f.failure_ttl, ARRAY_TTL)
  try('LREM', key('queue', f.origin), 0, array)
  try('ZREM', key('deferred', f.origin), array)
  redis.call('HSET', key('job', array), 'status', status, 'ended_at', NOW, 'fleet_reason', reason)
  if status == 'canceled' then
    try('ZADD', key('canceled', f.origin), math.floor(NOW_MS / 1000), array)
  else
    add_to(key(status, f.origin), array, ttl)
  end
  enqueue_dependents(array, status)
  keep(array, f, ttl)
  expire_array(array, ttl)
end

-- Whether it is stopped and some of its tasks run yet.
local function is_stopping(array)
  local a = array_fields(array)
  return a and a.stop and size_of('array_running', array) > 0
end

-- One that has ended, or is stopped, goes on.
local function revive_array(array)
  local a = array_fields(array)
  redis.call('HDEL', key('array', array), 'stop')
  local job = key('job', array)
  local f = redis.pcall('HMGET', job, 'status', 'origin')
  local registry = ARRAY_ENDS[f[1]]
  if not registry then
    return
  end
  try('ZREM', key(registry, f[2]), array)
  redis.call('HSET', job, 'ended_at', '')
  redis.call('HDEL', job, 'fleet_reason')
  for _, kind in ipairs({'job', 'dependents', 'dependencies'}) do
    redis.call('PERSIST', key(kind, array))
  end
  keep_array(array)
  wait_for_tasks(array, f[2])
  enqueue_dependents(array, 'deferred') -- those that failed for it wait again
  for _, follower in ipairs(followers(array, a)) do
    if redis.call('HDEL', key('array', follower), 'unmet') == 1 then
      revive_array(follower)
    end
  end
end

-- Nothing more of it is given out; what runs or waits is told so by others. `why`: canceled, max_fails, or
-- the state in which somebody else put its job.
local function stop_array(array, why)
  redis.call('HSET', key('array', array), 'stop', why)
  drop_all(array)
  local f = redis.pcall('HMGET', key('job', array), 'status', 'origin')
  if f[1] == 'queued' or f[1] == 'scheduled' then
    try('LREM', key('queue', f[2] or ''), 0, array)
    try('ZREM', key('scheduled', f[2] or ''), array)
    wait_for_tasks(array, f[2] or '')
  end
  touch_array(array)
end

-- One job out of its queue, or a durable wish and a message where it runs. Returns what control.cancel does.
local function cancel_job(id, ttl)
  local f = job_fields(id)
  if not f then
    return ''
  end
  local job = key('job', id)
  if redis.call('HEXISTS', job, 'fleet_array') == 1 then
    return 'array'
  end
  if f.status == 'started' and f.fleet_lease then
    redis.call('HSET', job, 'fleet_stop', '1')
    local signals = key('worker_signals', f.worker_name or '')
    redis.call('RPUSH', signals, cjson.encode({stop = id}))
    redis.call('EXPIRE', signals, 60)
    return 'stopping'
  end
  if f.status == 'finished' or f.status == 'failed' or f.status == 'stopped' or f.status == 'canceled' then
    return f.status
  end
  try('LREM', key('queue', f.origin), 0, id)
  try('ZREM', key('scheduled', f.origin), id)
  try('ZREM', key('deferred', f.origin), id)
  redis.call('HSET', job, 'status', 'canceled', 'ended_at', NOW)
  try('ZADD', key('canceled', f.origin), math.floor(NOW_MS / 1000), id)
  enqueue_dependents(id, 'canceled')
  keep(id, f, ttl)
  task_moves(id, f, 'waiting', 'canceled')
  return 'canceled'
end

-- Cancel what runs or waits of an array, at most so many.
local function cancel_tasks(array, most)
  for _, kind in ipairs({'array_waiting', 'array_running'}) do
    local numbers = try('SMEMBERS', key(kind, array)) or {}
    for i = 1, math.min(#numbers, most) do
      cancel_job(array .. '-' .. numbers[i], ARRAY_TTL)
    end
  end
end

local function settle_array(array, moves)
  local a = array_fields(array)
  if not a then
    return
  end
  for way, numbers in pairs(moves) do
    local from, to = string.match(way, '^(%l+) (%l+)$')
    move_tasks(array, a, from, to, numbers)
  end
  local failed = moves['running failed'] and a.max_fails and size_of('array_failed', array)
  if failed and failed > a.max_fails and not a.stop then
    stop_array(array, 'max_fails')
    cancel_tasks(array, MOST_AT_ONCE)
    a = array_fields(array)
  end
  if a.max_parallel then
    unpark(array, a)
  end
  local is_held = a.held > 0 and not (a.unmet or a.stop)
  local is_over = a.left == 0 and not is_held and size_of('array_running', array) == 0
  if is_over and size_of('array_waiting', array) == 0 then
    end_array(array, a)
  end
end

-- All that this script has moved; one end may lead to another.
local function settle_arrays()
  while moved[1] do
    local these = moved
    moved = {}
    for _, array in ipairs(these) do
      settle_array(array, these[array])
    end
  end
end

return {
  PLACES = PLACES, ARRAY_ENDS = ARRAY_ENDS, touch_array = touch_array, array_fields = array_fields,
  keep_array = keep_array, read_range = read_range, move_range = move_range, claim_tasks = claim_tasks,
  may_run_again = may_run_again, is_array_stopped = is_array_stopped, expire_array = expire_array,
  is_stopping = is_stopping, revive_array = revive_array, stop_array = stop_array, cancel_job = cancel_job,
  cancel_tasks = cancel_tasks, settle_arrays = settle_arrays,
}
