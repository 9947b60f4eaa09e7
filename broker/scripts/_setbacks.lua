-- What becomes of an attempt that did not end well, or whose job is to be run once more.

-- Why an attempt failed, as one of the few kinds of broker/history.py.
local function kind_of_failure(status, ended)
  local reason = ended.reason or ''
  local function begins(words)
    return string.sub(reason, 1, #words) == words
  end
  if status == 'stopped' then
    return 'stopped'
  elseif begins('WorkerLost: ') then
    return 'worker_lost'
  elseif begins('OutOfMemory: ') then
    return 'out_of_memory'
  elseif begins('Timeout: ') or string.find(reason, '^[%w_.]*JobTimeoutException') then
    return 'timeout'
  elseif begins('exit code ') then
    return 'exit_code'
  elseif begins('killed by ') or begins('Killed: ') then
    return 'signal'
  elseif not ended.duration or begins('ResultTooLarge: ') or begins('ResultRefused: ') then
    return 'other'
  end
  return 'exception'
end

local function list(text)
  local ok, values = pcall(cjson.decode, text or '[]')
  local found = {}
  for i, value in ipairs(ok and type(values) == 'table' and values or {}) do
    found[i] = number(value, 0)
  end
  return found
end

-- The attempt is over and the job is not.
local function leave(id, fields, outcome, ended)
  tell_times(ended)
  release(id, fields)
  redis.call('HSET', key('job', id), 'fleet_lease', '', 'fleet_attempts', attempts(fields, outcome, ended))
  task_moves(id, fields, 'running', 'waiting')
end

-- For good: `status` is failed or stopped, `kind` what RQ calls the result.
local function settle_failed(id, fields, ended, status, kind, outcome)
  local ttl = number(fields.failure_ttl, RQ_FAILURE_TTL)
  release(id, fields)
  stamp(id, fields, ended, status, outcome or status)
  tally(fields.origin, 'failed:' .. kind_of_failure(status, ended))
  add_result(id, fields, kind, ended)
  task_moves(id, fields, 'running', status == 'failed' and 'failed' or 'canceled')
  add_to(key('failed', fields.origin), id, ttl)
  keep(id, fields, ttl, ended, enqueue_dependents(id, status))
end

-- Whether an attempt that would be run again was the last, for somebody wants the job stopped; then it is.
local function stops(id, fields, outcome, ended)
  if not fields.fleet_stop or fields.fleet_stop == '' then
    return false
  end
  settle_failed(id, fields, ended, 'stopped', 'stopped', outcome)
  return true
end

-- Back to a queue, to be run again.
local function give_back(id, fields, outcome, ended, front)
  if stops(id, fields, outcome, ended) then
    return
  end
  leave(id, fields, outcome, ended)
  if outcome == 'handed-back' then
    tally(fields.origin, 'handed_back')
  end
  lists.enqueue(id, fields.origin, front, fields.ttl, outcome ~= 'failed')
end

local function repeat_it(id, fields, left)
  local intervals = list(fields.repeat_intervals)
  local delay = intervals[left] or intervals[#intervals] or 0
  redis.call('HSET', key('job', id), 'repeats_left', left - 1)
  if delay > 0 then
    lists.schedule(id, fields.origin, delay, fields.ttl)
  else
    lists.enqueue(id, fields.origin, false, fields.ttl)
  end
end

local function run_again(id, fields, ended, delay, front)
  tally(fields.origin, 'retried:' .. kind_of_failure('failed', ended))
  if delay > 0 then
    leave(id, fields, 'failed', ended)
    lists.schedule(id, fields.origin, delay, fields.ttl)
  else
    give_back(id, fields, 'failed', ended, front)
  end
end

-- A failure with retries left: rq.job.Job.retry.
local function retry(id, fields, ended)
  if stops(id, fields, 'failed', ended) then
    return
  end
  local left = number(fields.retries_left, 0)
  local intervals = list(fields.retry_intervals)
  local delay = intervals[math.max(#intervals - left, 0) + 1] or 0
  redis.call('HSETNX', key('job', id), 'fleet_retries', left) -- for an operator's retry, which renews them
  redis.call('HSET', key('job', id), 'retries_left', left - 1)
  run_again(id, fields, ended, delay, fields.enqueue_at_front_on_retry == '1')
end

-- A function returned rq.Retry: rq.worker.BaseWorker.handle_job_retry.
local function retry_returned(id, fields, ended)
  local done = number(fields.number_of_retries, 0)
  if done > 0 and done >= ended.retry_max then
    settle_failed(id, fields, ended, 'failed', 'exhausted')
    return
  elseif stops(id, fields, 'failed', ended) then
    return
  end
  local intervals = list(cjson.encode(ended.retry_intervals or {}))
  local delay = intervals[math.min(done + 1, #intervals)] or 0
  tell_times(ended)
  add_result(id, fields, 'retried', ended)
  keep_results(id, number(fields.failure_ttl, RQ_FAILURE_TTL))
  redis.call('HSET', key('job', id), 'number_of_retries', done + 1)
  run_again(id, fields, ended, delay, false)
end

-- The attempt is lost with its worker: once more at once, but not without end.
local function lose(id, fields, ended, limit)
  local losses = number(fields.fleet_losses, 0) + (ended.uncounted and 0 or 1)
  tally(fields.origin, 'lost')
  if losses > limit then
    settle_failed(id, fields, ended, 'failed', 'failed', 'lost')
  elseif not stops(id, fields, 'lost', ended) then
    observe(fields.origin, 'recovered', NOW_MS - tonumber(redis.call('ZSCORE', K.LEASES, id) or NOW_MS))
    redis.call('HSET', key('job', id), 'fleet_losses', losses)
    give_back(id, fields, 'lost', ended, true)
  end
end

return {
  give_back = give_back, repeat_it = repeat_it, settle_failed = settle_failed, retry = retry,
  retry_returned = retry_returned, lose = lose,
}
