-- Jobs that wait for others. Those that only RQ knows wait as RQ has it. One of ours says in its hash what
-- it wants where a job that it waits for ends otherwise: `fleet_on_failed_dependency` fail (it fails, too)
-- or wait, and in `fleet_after_any` which jobs may end as they like. A job that failed so is looked at again
-- whenever one that it waited for is run again, or ends.

local LOOKS = 200 -- dependents that one call looks at; a chore goes on with the others
local GATE = '^gate:' -- what stands for the rest of a submission in parts: broker/submit.py
local ENDED = {finished = true, failed = true, stopped = true, canceled = true}
local ENDS = {failed = ' failed', stopped = ' was stopped', canceled = ' was canceled'}

-- Whether a dependent of RQ's waits for nothing more, now that `parent` ended in `status`.
local function is_met(dependent, parent, status, allow_failure)
  if status ~= 'finished' and not (status == 'failed' and allow_failure) then
    return false
  end
  for _, id in ipairs(redis.pcall('SMEMBERS', key('dependencies', dependent))) do
    local other = id ~= parent and redis.pcall('HGET', key('job', id), 'status')
    if other and other ~= 'finished' and not (other == 'failed' and allow_failure) then
      return false
    end
  end
  return true
end

-- The status of a job, or nil: it is gone.
local function status_of(id)
  local status = redis.pcall('HGET', key('job', id), 'status')
  return type(status) == 'string' and status or nil
end

local function words(text)
  local found = {}
  for word in string.gmatch(text or '', '%S+') do
    found[word] = true
  end
  return found
end

-- A client of RQ may have canceled a job that runs: its worker ends it when it hears of that.
local function is_being_ended(id, state)
  return state == 'canceled' and tonumber(redis.call('ZSCORE', K.LEASES, id) or 0) > NOW_MS
end

-- What a job of ours is to do as far as `other` goes, which may have just ended in `status`: 'met', 'wait', or
-- 'fail', with the state of that one, nil: it is gone. What need not be waited for any more is forgotten, for
-- it may be gone tomorrow.
local function judge_one(job, other, status)
  local state = status_of(other)
  if status == 'finished' or not state then
    state = status
  end
  if is_being_ended(other, state) then
    return 'wait'
  elseif state == 'finished' or (job.any[other] and (not state or ENDED[state])) then
    redis.call('SREM', key('dependencies', job.id), other)
    return 'met'
  elseif not state or (ENDED[state] and (job.on_failed == 'fail' or string.find(other, GATE))) then
    return 'fail', state
  end
  return 'wait'
end

-- The same for all that it waits for, with the one to blame: most often it waits for many, and the first look
-- finds one that runs. `parent`, if one is given, just ended in `status`.
local function judge(job, parent, status)
  local waits_for = key('dependencies', job.id)
  if parent and redis.pcall('SISMEMBER', waits_for, parent) == 1 then
    local verdict, how = judge_one(job, parent, status)
    if verdict == 'fail' then
      return verdict, parent, how
    end
    for _, other in ipairs(redis.call('SRANDMEMBER', waits_for, 8)) do
      if not job.has_failed and judge_one(job, other) == 'wait' then
        return 'wait'
      end
    end
  end
  local verdict, culprit, how = 'met', nil, nil
  for _, other in ipairs(redis.pcall('SMEMBERS', waits_for)) do
    local found, state = judge_one(job, other)
    if found == 'fail' and (verdict ~= 'fail' or string.find(other, GATE)) then
      verdict, culprit, how = found, other, state
    elseif found == 'wait' and verdict == 'met' then
      verdict = found
    end
  end
  return verdict, culprit, how
end

-- Have a job wait for `parent`, and that one know of it for as long as it is kept.
local function await(id, parent)
  try('SADD', key('dependencies', id), parent)
  try('SADD', key('dependents', parent), id)
  local ttl = redis.call('TTL', key('job', parent))
  if ttl > 0 then
    redis.call('EXPIRE', key('dependents', parent), digits[ttl])
  end
end

local to_look = {} -- {dependent, parent, status of that}

local function look_later(entry)
  to_look[#to_look + 1] = entry
end

-- Returns whether there are any.
local function look_at_dependents(parent, status)
  local found = redis.pcall('SMEMBERS', key('dependents', parent))
  for _, id in ipairs(found) do
    look_later({id, parent, status})
  end
  return #found > 0
end

local function defer(id, queue)
  redis.call('HSET', key('job', id), 'status', 'deferred')
  try('ZADD', key('deferred', queue), NOW_SECONDS, id)
  redis.call('SADD', K.QUEUES, key('queue', queue))
end

local function fail_dependent(id, queue, failure_ttl, culprit, how)
  try('ZREM', key('deferred', queue), id)
  if string.find(culprit, GATE) then
    keep(id, {}, 0) -- as if it had never been; all that wait for it are behind that gate, too
    return
  end
  local reason = 'dependency ' .. culprit .. (ENDS[how] or ' is gone')
  local ttl = number(failure_ttl, RQ_FAILURE_TTL)
  redis.call('HSET', key('job', id), 'status', 'failed', 'ended_at', NOW, 'exc_info', reason,
    'fleet_reason', reason, 'fleet_dependency', culprit)
  tally(queue, 'failed:dependency')
  if ttl ~= 0 then
    try('ZADD', key('failed', queue), ttl < 0 and '+inf' or digits[math.floor(NOW_MS / 1000 + ttl)], id)
  end
  look_at_dependents(id, 'failed')
  keep(id, {}, ttl)
end

-- A job that failed for its parents is as it was before.
local function forgive(id, queue)
  try('ZREM', key('failed', queue), id)
  redis.call('HSET', key('job', id), 'ended_at', '', 'exc_info', '')
  redis.call('HDEL', key('job', id), 'fleet_reason', 'fleet_dependency')
  for _, kind in ipairs({'job', 'dependents', 'dependencies'}) do
    redis.call('PERSIST', key(kind, id))
  end
  look_at_dependents(id, 'deferred')
end

local function unblock(id, queue, front, ttl, parent)
  try('ZREM', key('deferred', queue), id)
  if parent then
    try('SREM', key('dependents', parent), id)
  end
  lists.enqueue(id, queue, front, ttl)
end

local DEPENDENT = {'status', 'origin', 'enqueue_at_front', 'ttl', 'allow_dependency_failures',
  'fleet_on_failed_dependency', 'fleet_after_any', 'fleet_dependency', 'started_at', 'failure_ttl'}

-- Move a job of ours that waits, or failed for its parents, if there is reason to.
local function look_at_ours(job, queue, f, parent, status)
  if job.has_failed and ENDS[status] then
    return -- it is no better off
  end
  local verdict, culprit, how = judge(job, parent, status)
  if verdict == 'fail' then
    if not job.has_failed then
      fail_dependent(job.id, queue, f[10], culprit, how)
    end
    return
  elseif job.has_failed then
    forgive(job.id, queue)
    defer(job.id, queue)
  end
  if verdict == 'met' then
    unblock(job.id, queue, f[3] == '1', f[4], parent)
  end
end

local function look(id, parent, status)
  local f = redis.pcall('HMGET', key('job', id), unpack(DEPENDENT))
  local state, queue, on_failed = f[1], f[2], f[6]
  local has_failed = state == 'failed' and f[8] and f[9] == ''
  if not queue or (state ~= 'deferred' and not has_failed) then
    return
  elseif on_failed then
    local job = {id = id, on_failed = on_failed, any = words(f[7]), has_failed = has_failed}
    look_at_ours(job, queue, f, parent, status)
  elseif is_met(id, parent, status, f[5] == '1') then
    unblock(id, queue, f[3] == '1', f[4], parent)
  end
end

local looks = 0

-- Look at those whose turn it is, and at those that follow from it; what is too much stays for later calls.
local function work_off()
  local at = 1
  while to_look[at] and looks < LOOKS do
    looks = looks + 1
    look(unpack(to_look[at], 1, 3))
    at = at + 1
  end
  for i = at, #to_look do
    later('RPUSH', K.SETTLING, cjson.encode(to_look[i]))
  end
  to_look = {}
end

return {
  LOOKS = LOOKS, GATE = GATE, is_met = is_met, status_of = status_of, words = words, judge = judge, await = await,
  look_later = look_later, look_at_dependents = look_at_dependents, defer = defer, forgive = forgive,
  unblock = unblock, look = look, work_off = work_off,
}
