-- Jobs that failed, were stopped or canceled are run again under their ids, as if submitted anew.
--
-- KEYS  for each job: rq:job:ID
-- ARGV  1 number of states that may be left so, then these  then for each job: id
-- Returns for each job: 'retried'; '' for no such job; 'stopping': a worker still ends it; 'taken': it is
-- in no registry, so somebody else (`rq requeue`) is about to queue it; 'dependency': it would fail at once
-- for a job that it waits for; 'array': its tasks may be retried, and retry_arrays.lua sees to the others; else
-- the state that forbids it.
--
-- It goes to the end of its queue, or back to the deferred ones where what it depends on has not ended as
-- it must, and with it go those that failed for it. Who takes it out of its registry is the one who may
-- queue it: RQ does the same. Attempts stay on record; losses, stop, exit code and times begin anew, retries
-- at the number that was submitted.
local state_count = tonumber(ARGV[1])
local allowed = {}
for i = 2, 1 + state_count do
  allowed[ARGV[i]] = true
end

local REGISTRIES = {failed = 'failed', stopped = 'failed', canceled = 'canceled'}

-- A client of RQ may have canceled a job that runs: its worker hears of it with its next beat.
local function is_still_run(id, f)
  local expiry = f.fleet_lease and tonumber(redis.call('ZSCORE', K.LEASES, id) or 0)
  if not expiry or expiry <= NOW_MS then
    return false
  end
  local held = redis.call('HGET', key('worker_leases', f.worker_name or ''), id)
  return held and string.match(held, '^(%S+)') == f.fleet_lease
end

-- Whether a job of ours may be queued, as `judge` has it. All that it was to wait for counts anew, but for
-- what is gone by now.
local function judge_anew(id, on_failed)
  local job, dependencies = key('job', id), key('dependencies', id)
  local f = redis.call('HMGET', job, 'dependency_ids', 'fleet_after_any')
  local ok, parents = pcall(cjson.decode, f[1] or '[]')
  redis.call('DEL', dependencies)
  for _, parent in ipairs(ok and type(parents) == 'table' and parents or {}) do
    if dependents.status_of(parent) then
      redis.call('SADD', dependencies, parent)
    end
  end
  local ttl = redis.call('TTL', job)
  if ttl > 0 then
    redis.call('EXPIRE', dependencies, ttl)
  end
  return (dependents.judge({id = id, on_failed = on_failed, any = dependents.words(f[2])}))
end

-- 'met': it may be queued; 'wait': those that it waits for will find it; 'fail': it would fail for these at once.
local function prospect(id)
  local f = redis.call('HMGET', key('job', id), 'fleet_on_failed_dependency', 'allow_dependency_failures')
  local verdict = f[1] and judge_anew(id, f[1]) or dependents.is_met(id, nil, 'finished', f[2] == '1') and 'met' or 'wait'
  if verdict == 'wait' then
    for _, parent in ipairs(redis.pcall('SMEMBERS', key('dependencies', id))) do
      dependents.await(id, parent)
    end
  end
  return verdict
end

local function begin_anew(id)
  local job = key('job', id)
  local fields = {'started_at', '', 'ended_at', '', 'exc_info', '', 'worker_name', ''}
  local retries = redis.call('HGET', job, 'fleet_retries')
  if retries then
    table.insert(fields, 'retries_left')
    table.insert(fields, retries)
  end
  redis.call('HSET', job, unpack(fields))
  redis.call('HDEL', job, 'fleet_losses', 'fleet_stop', 'fleet_exit_code', 'fleet_reason',
    'fleet_retries', 'number_of_retries', 'fleet_dependency')
  for _, kind in ipairs({'job', 'dependents', 'dependencies', 'results'}) do
    redis.call('PERSIST', key(kind, id))
  end
end

-- A task's array goes on; where there is none any more, the task is a job like any other.
local function tell_array(id, f)
  local array = f.fleet_array_of
  local a = array and arrays.array_fields(array)
  if array and not a then
    redis.call('HDEL', key('job', id), 'fleet_array_of')
  elseif array then
    task_moves(id, f, f.status == 'failed' and 'failed' or 'canceled', 'waiting')
    arrays.revive_array(array)
  end
end

local function retry_one(id, f)
  local queue, verdict = f.origin or '', prospect(id)
  if verdict == 'fail' then
    return 'dependency'
  end
  if try('ZREM', key(REGISTRIES[f.status], queue), id) ~= 1 then
    return 'taken'
  end
  if f.fleet_lease then
    release(id, f)
    redis.call('HSET', key('job', id), 'fleet_lease', '')
  end
  begin_anew(id)
  tell_array(id, f)
  if verdict == 'met' then
    lists.enqueue(id, queue, false, f.ttl)
  else
    dependents.defer(id, queue)
  end
  enqueue_dependents(id, 'queued') -- those that failed for it wait again
  return 'retried'
end

local outcomes = {}
for index = 1, #KEYS do
  local id = ARGV[1 + state_count + index]
  local f = job_fields(id)
  if not f then
    outcomes[index] = ''
  elseif not allowed[f.status] then
    outcomes[index] = f.status or ''
  elseif redis.call('HEXISTS', KEYS[index], 'fleet_array') == 1 then
    outcomes[index] = 'array'
  elseif is_still_run(id, f) or (f.fleet_array_of and arrays.is_stopping(f.fleet_array_of)) then
    outcomes[index] = 'stopping'
  else
    outcomes[index] = retry_one(id, f)
  end
end
for index = 1, #KEYS do -- what it waits for may have come after it
  if outcomes[index] == 'dependency' and dependents.status_of(ARGV[1 + state_count + index]) == 'deferred' then
    outcomes[index] = 'retried'
  end
end
return outcomes
