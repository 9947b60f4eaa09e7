-- New jobs, in one atomic step: all of them or, where one cannot be, none.
--
-- KEYS  none but those of the jobs named
-- ARGV  1 number of field names, then those names
--       then the number of sets of requirements, and for each: queue, digest, what it asks for as JSON
--       then for each job: id, list (`QUEUE` or `QUEUE@DIGEST`), the jobs it waits for, values in the order of
--       the names
--       The jobs it waits for are words: ID, and ~ID where that may end in whatever way; a job of this very call comes
--       before those that wait for it. '!': this job's id was chosen; '?': it waits where another fails
-- Returns {'taken', id}, {'unknown', id of what it would wait for, id}, {'cycle', id}, or
--         {'', then for each job that is not queued: id, its state}
--
-- Of an array (its field fleet_array is not empty) the keys below fleet:array:ID are there; from now on they stay.
local MOST_ANCESTORS = 1000 -- looked at in search of a cycle

local width = tonumber(ARGV[1])
local set_count = tonumber(ARGV[2 + width])
local first, step = 3 + width + 3 * set_count, 3 + width
local array_column
for column = 1, width do
  array_column = ARGV[1 + column] == 'fleet_array' and column or array_column
end

-- What the words say: the jobs to wait for, in order; which of them may end as they like; what the job wants
-- where another does not finish; whether its id was chosen.
local function parents_of(text)
  local parents, any, on_failed, is_chosen = {}, {}, 'fail', false
  for word in string.gmatch(text, '%S+') do
    if word == '!' then
      is_chosen = true
    elseif word == '?' then
      on_failed = 'wait'
    else
      local id = string.match(word, '^~?(.*)$')
      parents[#parents + 1] = id
      any[id] = word ~= id or nil
    end
  end
  return parents, any, on_failed, is_chosen
end

-- Whether one of these jobs waits for `id`, which is not there: an earlier one of that name was deleted.
local function wait_for(parents, id)
  local todo, seen, looked = {unpack(parents)}, {}, 0
  while #todo > 0 and looked < MOST_ANCESTORS do
    local one = table.remove(todo)
    looked = looked + 1
    if one == id then
      return true
    elseif not seen[one] and dependents.status_of(one) == 'deferred' then
      for _, other in ipairs(redis.pcall('SMEMBERS', key('dependencies', one))) do
        todo[#todo + 1] = other
      end
    end
    seen[one] = true
  end
  return false
end

-- Why these jobs cannot be; nil: they can.
local function refusal()
  local new = {}
  for i = first, #ARGV, step do
    local id = ARGV[i]
    if new[id] or redis.call('EXISTS', key('job', id)) == 1 then
      return {'taken', id}
    end
    if ARGV[i + 2] ~= '' then
      local parents, _, _, is_chosen = parents_of(ARGV[i + 2])
      if is_chosen and wait_for(parents, id) then
        return {'cycle', id}
      end
      for _, parent in ipairs(parents) do
        if not new[parent] and not dependents.status_of(parent) then
          return {'unknown', parent, id}
        end
      end
    end
    new[id] = true
  end
  return nil
end

local function add_fields(fields, at)
  for column = 1, width do
    if column ~= array_column or ARGV[at + 2 + column] ~= '' then
      fields[#fields + 1] = ARGV[1 + column]
      fields[#fields + 1] = ARGV[at + 2 + column]
    end
  end
end

-- A job that is to wait for others, and is judged at once. Returns its state.
local function add_dependent(id, queue, fields, text)
  local parents, any, on_failed = parents_of(text)
  local told, may_fail = {}, {}
  for _, parent in ipairs(parents) do
    dependents.await(id, parent)
    if not string.find(parent, dependents.GATE) then
      told[#told + 1] = parent
    end
    if any[parent] then
      may_fail[#may_fail + 1] = parent
    end
  end
  local more = {'fleet_on_failed_dependency', on_failed, 'fleet_after_any', table.concat(may_fail, ' ')}
  if #told > 0 then
    more[5], more[6], more[7], more[8] = 'dependency_id', told[1], 'dependency_ids', cjson.encode(told)
  end
  redis.call('HSET', key('job', id), unpack(fields))
  redis.call('HSET', key('job', id), unpack(more))
  dependents.defer(id, queue)
  dependents.look(id)
  dependents.work_off()
  return dependents.status_of(id)
end

local refused = refusal()
if refused then
  return refused
end
for i = 3 + width, first - 1, 3 do
  lists.add_set(ARGV[i], ARGV[i + 1], ARGV[i + 2])
end
local queues, reply = {}, {''}
for i = first, #ARGV, step do
  local id, queue = ARGV[i], ARGV[i + 1]
  local fields = {'created_at', NOW, 'origin', queue}
  add_fields(fields, i)
  if array_column and ARGV[i + 2 + array_column] ~= '' then
    arrays.keep_array(id)
  end
  if ARGV[i + 2] == '' or ARGV[i + 2] == '!' then
    redis.call('HSET', key('job', id), 'status', 'queued', 'enqueued_at', NOW, unpack(fields))
    redis.call('RPUSH', key('queue', queue), id)
    queues[queue] = true
  else
    local state = add_dependent(id, queue, fields, ARGV[i + 2])
    if state ~= 'queued' then
      reply[#reply + 1], reply[#reply + 2] = id, state
    end
  end
end
redis.call('SET', K.LAST, ARGV[#ARGV - step + 1])
for queue in pairs(queues) do
  redis.call('SADD', K.QUEUES, key('queue', queue))
  lists.announce(queue)
end
return reply
